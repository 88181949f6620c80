"""Wall-clock benchmark of a running cluster over HTTP, beside plain decoding and beside other servers.

Everything is measured where users are, at the client of a streamed answer. `python -m cluster.bench --help`.
"""
