"""Runs the application under Ray Serve, with replicas on many machines, scaled with the load.

    serve run modeling_llm2clip.serving.ray_serve:build model=my-model max_replicas=4

Each replica loads the model and batches its own requests. Ray's proxies accept and route requests,
so host and port are configured in Ray.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._extras import RAY_SERVE, SERVE, require
from ..configs.config_fields import make_config
from ..configs.serve_config import RayServeConfig


def build(options: Mapping[str, Any]) -> Any:
    """Build the application that `serve run` deploys.

    Options are the fields of `RayServeConfig`: strings from the command line of `serve run`, or
    values from the config file of `serve deploy`.
    """
    require(RAY_SERVE, *SERVE)
    from ray import serve

    config = _read_options(options)

    def make_app() -> Any:  # in each replica
        from .app import create_app
        from .service import EmbeddingService

        return create_app(EmbeddingService.open(config.model, config, index=config.index))

    deployment = serve.deployment(
        serve.ingress(make_app)(),
        name="llm2clip",
        ray_actor_options={"num_cpus": config.num_cpus, "num_gpus": config.num_gpus},
        max_ongoing_requests=config.max_ongoing_requests,
        graceful_shutdown_timeout_s=config.timeout_s,
        autoscaling_config={
            "min_replicas": config.min_replicas,
            "max_replicas": config.max_replicas,
            "target_ongoing_requests": config.target_ongoing_requests,
        },
    )
    return deployment.bind()


def _read_options(options: Mapping[str, Any]) -> RayServeConfig:
    if addresses := [name for name in ("host", "port") if name in options]:
        raise ValueError(
            f"{addresses}: Ray's proxies do the listening. Set the address with `serve start "
            "--http-host HOST --http-port PORT`, or under http_options in the config file of "
            "`serve deploy`."
        )
    return make_config(RayServeConfig, options)
