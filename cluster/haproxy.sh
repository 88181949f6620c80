#!/bin/sh
# HAProxy as cluster/haproxy.py has Ray Serve start it: `haproxy.sh -db -f CONFIG ...`.
# Serve writes CONFIG anew for every start and opens HAProxy's statistics and metrics to the whole network, without a
# password; here they stay on this machine. TAPS_HAPROXY is the program itself.
ports="$RAY_SERVE_HAPROXY_STATS_PORT\|$RAY_SERVE_HAPROXY_METRICS_PORT"
[ -f "$3" ] && sed -i "s/bind \*\?:\($ports\)\$/bind 127.0.0.1:\1/" "$3"
exec "$TAPS_HAPROXY" "$@"
