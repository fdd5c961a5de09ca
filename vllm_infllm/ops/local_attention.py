"""Whether xformers can provide a part of local attention: what is installed, and what the model needs.

Nothing is imported to find out: this runs in processes that must not touch a GPU.
"""

from importlib import metadata, util

from vllm_infllm.config import KEY

SUPPORTED = ("0.0.35",)
"""Versions of xformers whose sources the masks and layouts of triton/local_xformers.py were read in."""
CAPABILITIES = (8, 0), (9, 0)
"""Compute capabilities, first and last, that xformers runs FlashAttention 3 on."""


def refusal(operations: str, dtype: str, capability: tuple[int, int] | None) -> str | None:
    """Why local_attention="xformers" cannot run, naming the remedy; None if it can.

    operations: effective name of the ops. dtype: of the model, as "bfloat16". capability: of the GPU; None without one.
    """
    wants = f"--additional-config \"{KEY}\": local_attention='xformers' needs"
    without = "remove it to attend with Triton alone."
    install = f"pip install --no-deps xformers=={SUPPORTED[0]}, or {without}"
    if operations != "triton":
        return f"{wants} ops='triton', and the operations are {operations!r}: {without}"
    if capability is None:
        return f"{wants} a GPU, and this is the CPU platform: remove it."
    if not CAPABILITIES[0] <= capability <= CAPABILITIES[1]:
        first, last, found = (f"{major}.{minor}" for major, minor in (*CAPABILITIES, capability))
        return f"{wants} a GPU of compute capability {first} to {last}, and this one has {found}: {without}"
    if dtype not in ("float16", "bfloat16"):
        return f"{wants} a model in float16 or bfloat16, and this one is in {dtype}: set --dtype, or {without}"
    try:
        version = metadata.version("xformers")
    except metadata.PackageNotFoundError:
        return f"{wants} xformers {SUPPORTED[0]}, which is not installed: {install}"
    if version not in SUPPORTED:
        return f"{wants} xformers {SUPPORTED[0]}, and {version} is installed: {install}"
    if not util.find_spec("flash_attn_3"):
        return f"{wants} the package flash_attn_3 (FlashAttention 3), which is not installed: install it, or {without}"
    return None
