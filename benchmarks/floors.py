"""Floors on GPUs, from counts alone: what a step must read, compute and move, over what the data sheets promise.

`python -m benchmarks.floors` writes the tables of docs/gpu.md. Nothing here is measured.
"""

from dataclasses import dataclass
from pathlib import Path

from benchmarks.tables import fill_in
from vllm_infllm.tools.tables import Table

PAGE = Path("docs/gpu.md")
WIDTH = 2
"""Bytes an element: bfloat16."""
CONTEXTS = (32 << 10, 128 << 10, 1 << 20)
HIT_RATES = (0.0, 0.5, 0.9, 0.99)
N_INIT, N_LOCAL, TOPK, UNIT, EXC = 128, 4096, 16, 128, 512


@dataclass(frozen=True)
class Model:
    """Sizes from the model's published configuration."""

    name: str
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    hidden: int
    intermediate: int
    vocabulary: int

    @property
    def layer_parameters(self) -> int:
        """Of the matrices of all layers."""
        width = self.heads * self.head_size
        attention = self.hidden * (2 * width + 2 * self.kv_heads * self.head_size)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    @property
    def token_bytes(self) -> int:
        """Keys and values of a token in all layers."""
        return self.layers * 2 * self.kv_heads * self.head_size * WIDTH

    def products(self, keys: float) -> float:
        """Operations of both attention products of one query, in all layers."""
        return 4 * self.layers * self.heads * self.head_size * keys


@dataclass(frozen=True)
class Device:
    """Dense bfloat16 operations, memory and one direction of PCI Express a second, as the data sheets say."""

    name: str
    operations: float
    memory: float
    link: float


MODELS = (
    Model("Llama-3-8B", 32, 32, 8, 128, 4096, 14336, 128256),
    Model("Qwen2.5-7B", 28, 28, 4, 128, 3584, 18944, 152064),
)
DEVICES = (
    Device("A100 SXM 80 GB", 312e12, 2.039e12, 32e9),
    Device("H100 SXM 80 GB", 989e12, 3.35e12, 64e9),
)


def prefill(model: Model, device: Device, context: int) -> list[str]:
    """Milliseconds for 1,000 tokens, on average over a prompt of `context` tokens."""
    linear = 2 * model.layer_parameters
    seen = N_LOCAL + N_INIT + TOPK * UNIT + (UNIT + EXC) / 2
    # What a window's tokens received takes their scores a second time.
    received = model.products(N_LOCAL) / 2
    infllm = linear + model.products(seen) + received
    full = linear + model.products(context / 2)
    milliseconds = [1e6 * operations / device.operations for operations in (infllm, full)]
    return [f"{milliseconds[0]:.0f}", f"{milliseconds[1]:.0f}", f"{milliseconds[1] / milliseconds[0]:.1f}"]


def decode(model: Model, device: Device, context: int) -> list[str]:
    """Milliseconds a token of one request, its retrieved units resident."""
    weights = (model.layer_parameters + model.hidden * model.vocabulary) * WIDTH
    representatives = context // UNIT * model.layers * model.heads * model.head_size * WIDTH
    seen = N_LOCAL + N_INIT + TOPK * UNIT + UNIT / 2
    infllm = weights + model.token_bytes * seen + representatives
    full = weights + model.token_bytes * context
    milliseconds = [1e3 * moved / device.memory for moved in (infllm, full)]
    return [
        f"{milliseconds[0]:.1f}",
        f"{milliseconds[1]:.1f}",
        f"{milliseconds[1] / milliseconds[0]:.1f}",
        f"{(model.token_bytes * seen + representatives) / 1e9:.1f}",
        f"{model.token_bytes * context / 1e9:.0f}",
    ]


def traffic(model: Model, device: Device) -> list[str]:
    """Milliseconds on the link for a decoded token, by the share of units found resident."""
    retrieved = TOPK * UNIT * model.token_bytes
    return [f"{retrieved / 1e6:.0f}", *(f"{1e3 * retrieved * (1 - rate) / device.link:.2f}" for rate in HIT_RATES)]


def prefill_traffic(model: Model, device: Device) -> list[str]:
    """Milliseconds on the link for 1,000 tokens of a prompt: units written, and those retrieved and not resident."""
    written, retrieved = 1000 * model.token_bytes, 1000 / EXC * TOPK * UNIT * model.token_bytes
    return [
        f"{1e3 * written / device.link:.1f}",
        *(f"{1e3 * retrieved * (1 - rate) / device.link:.1f}" for rate in HIT_RATES),
    ]


def tables() -> dict[str, list[Table]]:
    """The tables by section of the page."""
    pairs = [(model, device) for model in MODELS for device in DEVICES]
    by_context = [(model, device, context) for model, device in pairs for context in CONTEXTS]
    names = [[model.name, device.name, _tokens(context)] for model, device, context in by_context]
    prefills = [[*name, *prefill(*which)] for name, which in zip(names, by_context, strict=True)]
    decodes = [[*name, *decode(*which)] for name, which in zip(names, by_context, strict=True)]
    sides = ("", "", "context", "infllm ms", "full attention ms", "ratio")
    return {
        "gpu-prefill": [Table("Prefill of 1,000 tokens", sides, prefills)],
        "gpu-decode": [
            Table("A decoded token", (*sides, "infllm GB, all but weights", "full attention GB"), decodes),
        ],
        "gpu-link": [
            Table(
                "Units over PCI Express",
                ("", "", "MB retrieved a token", *(f"ms, {rate:.0%} resident" for rate in HIT_RATES)),
                [[model.name, device.name, *traffic(model, device)] for model, device in pairs],
            ),
            Table(
                "The same for 1,000 tokens of a prompt",
                ("", "", "ms out, sealed", *(f"ms in, {rate:.0%} resident" for rate in HIT_RATES)),
                [[model.name, device.name, *prefill_traffic(model, device)] for model, device in pairs],
            ),
        ],
    }


def _tokens(count: int) -> str:
    return f"{count >> 20}M" if count >= 1 << 20 else f"{count >> 10}K"


def main() -> None:
    """Bring the page's tables up to date."""
    sections = {name: "\n\n".join(table.markdown() for table in made) for name, made in tables().items()}
    PAGE.write_text(fill_in(PAGE.read_text() if PAGE.exists() else "", sections))


if __name__ == "__main__":
    main()
