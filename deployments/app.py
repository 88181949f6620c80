"""The application builders that serve_config.yaml names: the only place where deployments are bound.

Serve reads the argument types at run time, so annotations are not postponed here. A class that
`serve.deployment` decorates is a deployment, which its types do not say: hence the casts.
"""

from typing import Any, cast

from ray.serve import Application

from deployments.config import CoreArgs, SpecialistArgs
from deployments.drafter import Drafter
from deployments.router import Router
from deployments.verifier import Verifier


def core(args: CoreArgs) -> Application:
    """The router with the HTTP edge, and the verifier it leases sessions from."""
    verifier = cast(Any, Verifier).bind(args.target, args.verifier)
    app: Application = cast(Any, Router).bind(verifier, args.target, args.router)
    return app


def specialist(args: SpecialistArgs) -> Application:
    """One specialist, an application of its own: adding it restarts nothing."""
    app: Application = cast(Any, Drafter).bind(args)
    return app
