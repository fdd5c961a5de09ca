"""The entry point, and everything of vLLM that is wrapped or replaced at run time (how a server stops: stopping.py).

Read in vLLM 0.32.0 and 0.33.0. vLLM calls `register` in every process it starts (API server, engine core, workers).

Public hooks used elsewhere: KVCacheSpecRegistry (memory/manager.py), KV connector (memory/connector.py),
scheduler_cls (scheduler.py), worker_cls (worker/), AttentionBackend (attention/backend.py). What those files touch
beyond the hook itself (the Mamba split and the order of a step's outputs in scheduler.py, the rotary modules in
attention/rope.py, the block manager's helpers in memory/manager.py) says why where it stands; tests/vllm_contract.py
lists every name and the file that needs it, those of the tools too.
"""

import functools
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm_infllm import __version__, ops, stopping
from vllm_infllm.config import DEFAULT_BLOCK_SIZE, KEY, ConfigError, InfLLMConfig, explain_shrinking, resolve
from vllm_infllm.memory import trace
from vllm_infllm.ops import local_attention

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

BACKEND = "INFLLM"
BACKEND_PATH = "vllm_infllm.attention.backend.InfLLMBackend"
CONNECTOR = "InfLLMConnector"
SUPPORTED_VLLM = ((0, 32), (0, 33))


def register() -> None:
    """Make `--attention-backend infllm` known to vLLM; idempotent."""
    from vllm.logger import init_logger

    unsupported = unsupported_vllm()
    if unsupported:
        # Not an exception: other backends of this vLLM are none of our business.
        init_logger(f"vllm.{__name__}").error("%s The backend infllm is not available.", unsupported)
        return
    _register_backend()
    _register_connector()
    _select_on_this_platform()
    _complete_engine_args()


def unsupported_vllm() -> str | None:
    """What is wrong with the installed vLLM, in one sentence; None if it is supported."""
    supported = " and ".join(f"{major}.{minor}" for major, minor in SUPPORTED_VLLM)
    try:
        from vllm.version import __version_tuple__
    except ImportError:
        return (
            f"vllm-infllm {__version__} needs vLLM {supported}, and none is installed: "
            "pip install 'vllm-infllm[cpu]' or 'vllm-infllm[cuda]'."
        )
    if tuple(__version_tuple__[:2]) in SUPPORTED_VLLM:
        return None
    found = ".".join(map(str, __version_tuple__[:3]))
    return f"vllm-infllm {__version__} supports vLLM {supported}, and {found} is installed: install one of these."


def backend_member() -> "AttentionBackendEnum":
    """The enum member of the backend; pickles in place of the member itself.

    So it is asked for where a process of vLLM begins that runs an engine with InfLLM.
    """
    stopping.end_soon()
    _register_backend()
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return AttentionBackendEnum[BACKEND]


def _register_backend() -> None:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if BACKEND in AttentionBackendEnum.__members__:
        return
    register_backend(BACKEND, BACKEND_PATH)
    # A member made at run time is unknown to a spawned process when its configuration is unpickled there.
    AttentionBackendEnum[BACKEND].__reduce_ex__ = lambda protocol: (backend_member, ())


def _register_connector() -> None:
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "vllm_infllm.memory.connector", CONNECTOR)


def _select_on_this_platform() -> None:
    """Let the platform choose InfLLM for full causal attention, and its own backend for every other layer.

    CpuPlatform.get_attn_backend_cls ignores all backends but its own; CUDA's refuses a selected backend that cannot
    do a layer (sliding window, encoder) instead of choosing another.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.get_attn_backend_cls
    if getattr(original, "_infllm", False):
        return

    @functools.wraps(original.__func__)
    def get_attn_backend_cls(
        cls: Any, selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None
    ) -> str:
        if getattr(selected_backend, "name", None) != BACKEND:
            return original(selected_backend, attn_selector_config, num_heads)
        if attn_selector_config.has_sliding_window or attn_selector_config.attn_type != "decoder":
            return original(None, attn_selector_config, num_heads)
        reasons = selected_backend.get_class().validate_configuration(
            device_capability=cls.get_device_capability(), **attn_selector_config._asdict()
        )
        if reasons:
            raise ConfigError(f"--attention-backend infllm cannot run this model: {', '.join(reasons)}.")
        return selected_backend.get_path()

    get_attn_backend_cls._infllm = True  # type: ignore[attr-defined]
    platform.get_attn_backend_cls = classmethod(get_attn_backend_cls)


def _complete_engine_args() -> None:
    """Set what InfLLM needs, so that the user has to give one flag only.

    EngineArgs is where command line and LLM(...) meet, before the configuration is built and sent to other
    processes.
    """
    from vllm.engine.arg_utils import EngineArgs

    if getattr(EngineArgs.create_engine_config, "_infllm", False):
        return
    create_model_config = EngineArgs.create_model_config
    create_engine_config = EngineArgs.create_engine_config

    @functools.wraps(create_engine_config)
    def with_infllm(self: "EngineArgs", *args: Any, **kwargs: Any) -> "VllmConfig":
        if not _selected(self):
            return create_engine_config(self, *args, **kwargs)
        _check_args(self)
        _complete_args(self)
        vllm_config = create_engine_config(self, *args, **kwargs)
        _check_config(vllm_config)
        _warn_of_waiting_prompts(vllm_config)
        _complete_config(vllm_config)
        stopping.prepare(CONNECTOR)
        return vllm_config

    @functools.wraps(create_model_config)
    def with_any_max_model_len(self: "EngineArgs") -> "ModelConfig":
        if not _selected(self):
            return create_model_config(self)
        return _long_model_config(self, create_model_config)

    with_infllm._infllm = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = with_infllm
    EngineArgs.create_model_config = with_any_max_model_len


def _selected(args: "EngineArgs") -> bool:
    backend = args.attention_backend or args.attention_config.backend
    return str(getattr(backend, "name", backend)).upper() == BACKEND


def _check_args(args: "EngineArgs") -> None:
    """Refuse flags that take part in building the configuration."""
    transfer = args.kv_transfer_config
    connector = transfer.get("kv_connector") if isinstance(transfer, dict) else getattr(transfer, "kv_connector", None)
    if connector not in (None, CONNECTOR):
        raise ConfigError(
            f"--kv-transfer-config: KV connector {connector} cannot run beside --attention-backend infllm, which "
            "moves KV by a connector of its own: remove one of them."
        )
    if args.kv_offloading_size is not None:
        raise ConfigError(
            f"--kv-offloading-size {args.kv_offloading_size} cannot be used with --attention-backend infllm, which "
            "keeps its own host memory: remove it."
        )
    if args.speculative_config is not None:
        raise ConfigError(
            "--speculative-config is not supported with --attention-backend infllm: "
            f"remove it (it is {args.speculative_config})."
        )
    if args.num_gpu_blocks_override is not None:
        raise ConfigError(
            f"--num-gpu-blocks-override {args.num_gpu_blocks_override} cannot be used with --attention-backend infllm, "
            "whose memory plan would not know of it: set --kv-cache-memory-bytes instead."
        )
    for name, flag in (("worker_cls", "--worker-cls"), ("scheduler_cls", "--scheduler-cls")):
        value = getattr(args, name)
        own = "vllm_infllm." in str(value)
        if value not in (None, "auto") and not own:
            raise ConfigError(
                f"{flag} {value} cannot be used with --attention-backend infllm, which sets it: remove it."
            )


def _complete_args(args: "EngineArgs") -> None:
    from vllm.config import KVTransferConfig
    from vllm.logger import init_logger

    args.kv_transfer_config = KVTransferConfig(kv_connector=CONNECTOR, kv_role="kv_both")
    args.block_size = args.block_size or DEFAULT_BLOCK_SIZE
    if args.enable_prefix_caching is not False:
        init_logger(f"vllm.{__name__}").info("InfLLM: prefix caching is switched off, it is not supported yet.")
        args.enable_prefix_caching = False


def _long_model_config(args: "EngineArgs", create: Callable[["EngineArgs"], "ModelConfig"]) -> "ModelConfig":
    """The model's configuration with a max_model_len that may exceed the trained length.

    vLLM refuses one without an environment variable. Here it is safe: no query sees a distance of n_local or more,
    and the rotary tables are extended (worker/base.py).
    """
    requested = args.max_model_len
    args.max_model_len = None
    try:
        model_config = create(args)
    finally:
        args.max_model_len = requested
    _resolve_config(args, model_config)
    if requested == -1:
        raise ConfigError(
            "--max-model-len auto is not supported with --attention-backend infllm: give a number of tokens."
        )
    if requested is not None:
        model_config.max_model_len = model_config.original_max_model_len = requested
    return model_config


def _resolve_config(args: "EngineArgs", model_config: "ModelConfig") -> None:
    """Replace what the user wrote in --additional-config by the effective configuration, complete and checked."""
    from vllm.logger import init_logger

    given = dict(args.additional_config or {})
    user = given.get(KEY, {})
    if isinstance(user, _Resolved):
        return
    config = resolve(user, args.block_size or DEFAULT_BLOCK_SIZE, model_config.max_model_len)
    check_selection(config)
    shrunk = explain_shrinking(config, user)
    if shrunk:
        init_logger(f"vllm.{__name__}").info(
            "InfLLM: defaults shrunk to fit a model trained on %d tokens: %s.", model_config.max_model_len, shrunk
        )
    args.additional_config = {**given, KEY: _Resolved({**config.model_dump(), **platform_defaults(config)})}


def platform_defaults(config: InfLLMConfig) -> dict[str, Any]:
    """Fields whose defaults depend on the platform."""
    from vllm.platforms import current_platform

    slots = config.max_cached_blocks
    if slots is None:
        # On a CPU units are read where they are; over a GPU's link every reader of a unit would pay again.
        slots = 0 if current_platform.is_cpu() else 2 * config.topk
    return {"ops": chosen_ops(config), "max_cached_blocks": slots}


def chosen_ops(config: InfLLMConfig) -> ops.OpsName:
    """The implementation of the operations: what was asked for, else the platform's."""
    from vllm.platforms import current_platform

    on_cpu = current_platform.is_cpu()
    if config.ops == "cpu" and not on_cpu:
        raise ConfigError(
            f"--additional-config \"{KEY}\": ops='cpu' needs the CPU platform, and this is "
            f"{current_platform.device_name}: remove it."
        )
    if config.ops == "triton" and on_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ConfigError(
            f"--additional-config \"{KEY}\": ops='triton' needs a GPU, and this is the CPU platform: remove it. (To "
            "test the kernels in Triton's interpreter set TRITON_INTERPRET=1.)"
        )
    return config.ops or ("cpu" if on_cpu else "triton")


def check_selection(config: InfLLMConfig) -> None:
    """Refuse a selection rule that the platform cannot run."""
    from vllm.platforms import current_platform

    if config.selection != "mean" and not current_platform.is_cpu():
        raise ConfigError(
            f"--additional-config \"{KEY}\": selection='{config.selection}' runs on the CPU platform only, and this is "
            f"{current_platform.device_name}: remove it for the paper's rule."
        )


class _Resolved(dict[str, Any]):
    """An effective configuration, so that building a configuration twice from the same arguments is harmless."""


def _check_config(config: "VllmConfig") -> None:
    """Refuse what InfLLM cannot do, naming the flag."""
    from vllm.v1.kv_cache_interface import is_quantized_kv_cache

    model, cache, scheduler, parallel = (
        config.model_config,
        config.cache_config,
        config.scheduler_config,
        config.parallel_config,
    )
    exc = config.additional_config[KEY]["exc_block_size"]
    threshold, dtype = scheduler.long_prefill_token_threshold, str(model.dtype).removeprefix("torch.")
    refusals = [
        (is_quantized_kv_cache(cache.cache_dtype), f"--kv-cache-dtype {cache.cache_dtype}", "use auto"),
        (
            cache.cache_dtype not in ("auto", dtype),
            f"--kv-cache-dtype {cache.cache_dtype} with a model in {dtype}",
            "use auto",
        ),
        (model.use_mla, f"MLA attention, which {model.model} uses,", "choose another backend"),
        (model.uses_alibi, f"ALiBi, which {model.model} uses,", "choose another backend"),
        (model.is_encoder_decoder, f"an encoder-decoder model, {model.model},", "choose another backend"),
        (
            model.is_hybrid or model.has_inner_state or model.is_attention_free,
            f"a model with state-space layers, {model.model},",
            "choose another backend",
        ),
        (model.attn_type.startswith("encoder"), f"an encoder-only model, {model.model},", "choose another backend"),
        (
            parallel.tensor_parallel_size > 1,
            f"--tensor-parallel-size {parallel.tensor_parallel_size}",
            "use 1: InfLLM runs on one device so far",
        ),
        (
            parallel.pipeline_parallel_size > 1,
            f"--pipeline-parallel-size {parallel.pipeline_parallel_size}",
            "use 1: InfLLM runs on one device so far",
        ),
        (
            parallel.data_parallel_size > 1,
            f"--data-parallel-size {parallel.data_parallel_size}",
            "use 1: InfLLM runs on one device so far",
        ),
        (
            parallel.decode_context_parallel_size > 1,
            f"--decode-context-parallel-size {parallel.decode_context_parallel_size}",
            "use 1",
        ),
        (parallel.enable_dbo, "--enable-dbo", "remove it"),
        (scheduler.disable_hybrid_kv_cache_manager, "--disable-hybrid-kv-cache-manager", "remove it"),
        (
            scheduler.max_num_batched_tokens < exc,
            f"--max-num-batched-tokens {scheduler.max_num_batched_tokens} below exc_block_size {exc}",
            f"raise it to at least {exc}",
        ),
        (
            (scheduler.max_num_scheduled_tokens or exc) < exc,
            f"max_num_scheduled_tokens {scheduler.max_num_scheduled_tokens} below exc_block_size {exc}",
            f"raise it to at least {exc}",
        ),
        (
            0 < threshold < exc,
            f"--long-prefill-token-threshold {threshold} below exc_block_size {exc}",
            f"raise it to at least {exc}",
        ),
    ]
    for refused, what, remedy in refusals:
        if refused:
            raise ConfigError(f"--attention-backend infllm does not support {what}: {remedy}.")
    effective = config.additional_config[KEY]
    unsupported = ops.load(effective["ops"]).check(model.get_head_size(), effective["block_size"])
    if unsupported:
        raise ConfigError(unsupported)
    if effective["local_attention"] and (
        unsupported := local_attention.refusal(effective["ops"], dtype, _capability())
    ):
        raise ConfigError(unsupported)


def _capability() -> tuple[int, int] | None:
    """Compute capability of the GPU; None without one."""
    from vllm.platforms import current_platform

    found = None if current_platform.is_cpu() else current_platform.get_device_capability()
    return (found.major, found.minor) if found else None


def _warn_of_waiting_prompts(config: "VllmConfig") -> None:
    """Prefill goes in whole execution blocks: say so if decoding requests can leave too little budget for one."""
    from vllm.logger import init_logger

    scheduler, exc = config.scheduler_config, config.additional_config[KEY]["exc_block_size"]
    if scheduler.max_num_batched_tokens < exc + scheduler.max_num_seqs - 1:
        init_logger(f"vllm.{__name__}").warning(
            "InfLLM: --max-num-batched-tokens %d is less than exc_block_size %d + --max-num-seqs %d - 1: while many "
            "requests decode, prompts wait.",
            scheduler.max_num_batched_tokens,
            exc,
            scheduler.max_num_seqs,
        )


def _complete_config(config: "VllmConfig") -> None:
    from vllm.platforms import current_platform

    kind = "Async" if config.scheduler_config.async_scheduling else ""
    config.scheduler_config.scheduler_cls = f"vllm_infllm.scheduler.InfLLM{kind}Scheduler"
    worker = "cpu.InfLLMCPUWorker" if current_platform.is_cpu() else "gpu.InfLLMGPUWorker"
    config.parallel_config.worker_cls = f"vllm_infllm.worker.{worker}"
    _check_requests()


def _check_requests() -> None:
    """Refuse requests with a mistyped trace argument (HTTP 400), where the platform may refuse a request.

    The only other public place, a logits processor, would run in every step.
    """
    from vllm.exceptions import VLLMValidationError
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.validate_request
    if getattr(original, "_infllm", False):
        return

    @functools.wraps(original.__func__)
    def validate_request(cls: Any, processed_inputs: Any, params: Any) -> None:
        original(processed_inputs, params)
        try:
            wanted = trace.asked(getattr(params, "extra_args", None))
        except ValueError as error:
            raise VLLMValidationError(str(error)) from error
        if wanted and params.n > 1:
            raise VLLMValidationError(f"{trace.ARGUMENT} is for one answer, and n={params.n}: set n to 1.")

    validate_request._infllm = True  # type: ignore[attr-defined]
    platform.validate_request = classmethod(validate_request)
