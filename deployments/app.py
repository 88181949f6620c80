"""The application builders that serve_config.yaml names: the only place where deployments are bound.

Serve reads the argument types at run time, so annotations are not postponed here.
"""

from ray.serve import Application

from deployments.config import CoreArgs, SpecialistArgs
from deployments.drafter import Drafter
from deployments.router import Router
from deployments.verifier import Verifier


def core(args: CoreArgs) -> Application:
    """The router with the HTTP edge, and the verifier it leases sessions from."""
    verifier = Verifier.bind(args.target, args.verifier)  # type: ignore[attr-defined]
    app: Application = Router.bind(verifier, args.target, args.router)  # type: ignore[attr-defined]
    return app


def specialist(args: SpecialistArgs) -> Application:
    """One specialist, an application of its own: adding it restarts nothing."""
    app: Application = Drafter.bind(args)  # type: ignore[attr-defined]
    return app
