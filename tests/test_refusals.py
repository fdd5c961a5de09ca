"""What InfLLM cannot do stops startup, with one message that names the flag or field, the value and the remedy."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.plugins import load_general_plugins

from tests import tiny_models
from tests.engines import infllm_engine
from vllm_infllm import plugin
from vllm_infllm.config import ConfigError, InfLLMConfig


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=8192)


def engine_config(model: str, infllm: dict[str, Any] | None = None, **flags: Any) -> Any:
    load_general_plugins()
    additional = {"infllm": infllm} if infllm is not None else {}
    args = EngineArgs(
        model, attention_backend="infllm", additional_config=additional, skip_tokenizer_init=True, **flags
    )
    return args.create_engine_config()


CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}

REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    # name: (fields of infllm, flags of vLLM, words of the message)
    "mistyped field": ({"top_k": 8}, {}, ["top_k=8", 'Did you mean "topk"?']),
    "unknown field": ({"window": 8}, {}, ["window=8", "Known fields: n_init, n_local"]),
    "wrong type": ({"topk": "many"}, {}, ["topk='many'", "integer"]),
    "negative topk": ({"topk": -1}, {}, ["topk=-1", "greater than or equal to 0"]),
    "n_local does not divide": ({"n_local": 1000}, {}, ["n_local=1000", "--block-size 128", "use 896"]),
    "n_init does not divide": ({"n_init": 64}, {}, ["n_init=64", "--block-size 128", "use 128"]),
    "exc above n_local": ({"n_local": 256, "exc_block_size": 512}, {}, ["exc_block_size=512", "n_local 256"]),
    "fewer slots than units": ({"max_cached_blocks": 8}, {}, ["max_cached_blocks=8", "topk 16", "set 0"]),
    "longer than trained": ({"n_local": 8192}, {}, ["n_local=8192", "8192 that the model was trained for"]),
    "quantized cache": ({}, {"kv_cache_dtype": "fp8"}, ["--kv-cache-dtype fp8", "use auto"]),
    "cache of another dtype": (
        {},
        {"dtype": "float32", "kv_cache_dtype": "bfloat16"},
        ["--kv-cache-dtype bfloat16 with a model in float32", "use auto"],
    ),
    "another connector": ({}, {"kv_transfer_config": CONNECTOR}, ["--kv-transfer-config", "ExampleConnector"]),
    "kv offloading": ({}, {"kv_offloading_size": 1.0}, ["--kv-offloading-size 1.0", "remove it"]),
    "speculative decoding": (
        {},
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3}},
        ["--speculative-config", "remove it"],
    ),
    "small token budget": ({}, {"max_num_batched_tokens": 256}, ["--max-num-batched-tokens 256", "at least 512"]),
    "small prefill threshold": (
        {},
        {"long_prefill_token_threshold": 100},
        ["--long-prefill-token-threshold 100", "at least 512"],
    ),
    "tensor parallel": ({}, {"tensor_parallel_size": 2}, ["--tensor-parallel-size 2", "use 1"]),
    "scheduler of one's own": ({}, {"scheduler_cls": "my.Scheduler"}, ["--scheduler-cls my.Scheduler", "remove it"]),
    "worker of one's own": ({}, {"worker_cls": "my.Worker"}, ["--worker-cls my.Worker", "remove it"]),
    "no hybrid cache manager": (
        {},
        {"disable_hybrid_kv_cache_manager": True},
        ["--disable-hybrid-kv-cache-manager", "remove it"],
    ),
    "block size that C++ cannot run": (
        {"ops": "cpu"},
        {"block_size": 24},
        ["--block-size 24", "multiple of 16", 'ops="reference"'],
    ),
    "operations of a GPU": ({"ops": "triton"}, {}, ["ops='triton'", "needs a GPU", "remove it"]),
    "xformers without a GPU": (
        {"local_attention": "xformers"},
        {},
        ["local_attention='xformers'", "needs ops='triton'", "'cpu'", "remove it"],
    ),
    "xformers, mistyped": ({"local_attention": "xformer"}, {}, ["local_attention='xformer'", "'xformers'"]),
    "number of blocks": (
        {},
        {"num_gpu_blocks_override": 9},
        ["--num-gpu-blocks-override 9", "--kv-cache-memory-bytes"],
    ),
    "automatic length": ({}, {"max_model_len": -1}, ["--max-model-len auto", "give a number"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_configuration_is_refused(name: str, llama: str) -> None:
    fields, flags, words = REFUSED[name]
    with pytest.raises(ConfigError) as refusal:
        engine_config(llama, fields, **flags)
    for word in words:
        assert word in str(refusal.value)


def save_config(name: str, folder: Path, **fields: Any) -> str:
    """A model folder that holds a configuration only; enough to build vLLM's configuration."""
    config = getattr(transformers, name)(**fields)
    config.architectures = [name.removesuffix("Config") + ("Model" if name == "BertConfig" else "ForCausalLM")]
    config.save_pretrained(folder)
    return str(folder)


def test_head_size_is_refused(tmp_path: Path) -> None:
    """A model whose heads the C++ operations cannot run is told which implementation can, and starts with it."""
    sizes = {"hidden_size": 48, "num_attention_heads": 2, "num_hidden_layers": 1, "max_position_embeddings": 8192}
    folder = save_config("LlamaConfig", tmp_path, **sizes)
    with pytest.raises(ConfigError, match=r'head size 24: .*ops="reference"'):
        engine_config(folder, {"ops": "cpu"})
    assert engine_config(folder, {"ops": "reference"}).additional_config["infllm"]["ops"] == "reference"


def test_alibi_is_refused(tmp_path: Path) -> None:
    folder = save_config("BloomConfig", tmp_path, hidden_size=64, n_head=4, n_layer=1, vocab_size=256)
    with pytest.raises(ConfigError, match="does not support ALiBi"):
        engine_config(folder, max_model_len=8192)


def test_encoder_only_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1, "max_position_embeddings": 8192}
    with pytest.raises(ConfigError, match="does not support an encoder-only model"):
        engine_config(save_config("BertConfig", tmp_path, **sizes))


def test_mla_is_refused(tmp_path: Path) -> None:
    folder = save_config("DeepseekV2Config", tmp_path, num_hidden_layers=1, max_position_embeddings=8192)
    with pytest.raises(ConfigError, match="MLA"):
        engine_config(folder)


def test_state_space_layers_are_refused(tmp_path: Path) -> None:
    folder = save_config("MambaConfig", tmp_path, hidden_size=64, num_hidden_layers=1, vocab_size=256)
    with pytest.raises(ConfigError, match="state-space layers"):
        engine_config(folder, max_model_len=8192)


START = {"block_size": 32, "max_num_batched_tokens": 256}
SIZES = {"n_init": 32, "n_local": 128, "topk": 3, "exc_block_size": 64}


def test_learned_absolute_positions_are_refused(tmp_path: Path) -> None:
    sizes = {"n_embd": 64, "n_head": 2, "n_layer": 1, "n_positions": 1024, "vocab_size": 256}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained(tmp_path)
    with (
        pytest.raises(ConfigError, match=r"layer transformer.h.0.attn.attn has 0 rotary modules.*learned absolute"),
        infllm_engine(str(tmp_path), SIZES, **START),
    ):
        pass


def test_a_rope_that_cannot_be_extended_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    folder = tiny_models.make("llama", tmp_path, rope_parameters=rope, max_position_embeddings=1024)
    with pytest.raises(ConfigError, match="rope type DynamicNTKScaling"), infllm_engine(folder, SIZES, **START):
        pass


def test_soft_capped_scores_are_refused(tmp_path: Path) -> None:
    config = transformers.Gemma2Config(
        **{**tiny_models.COMMON, "layer_types": ["full_attention"] * 2, "query_pre_attn_scalar": 32}
    )
    transformers.Gemma2ForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="soft-capped attention scores"), infllm_engine(str(tmp_path), SIZES, **START):
        pass


def test_too_little_host_memory_is_refused(llama: str) -> None:
    """The message says how many GiB are missing."""
    with (
        pytest.raises(ConfigError, match=r"--max-model-len 8192 needs 252 host units = 0.01 GiB.*0.01 GiB are missing"),
        infllm_engine(llama, {**SIZES, "host_memory_gib": 0.001}, max_model_len=8192, **START),
    ):
        pass


def test_prefix_caching_is_switched_off(llama: str) -> None:
    assert not engine_config(llama, enable_prefix_caching=True).cache_config.enable_prefix_caching


def test_defaults_shrink_to_the_trained_length(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tiny_models.make("llama", tmp_path, max_position_embeddings=2048)
    config = engine_config(folder, max_model_len=100_000)
    assert config.model_config.max_model_len == 100_000
    assert config.additional_config["infllm"]["n_local"] == 1280


def test_the_command_line_prints_the_message_and_exits(llama: str) -> None:
    """`vllm serve` with a mistyped field: the message, a non-zero exit status, no process left waiting."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", llama, "--attention-backend", "InfLLM"]
    infllm = {"infllm": {"topk": 4, "n_locl": 1024}}
    run = subprocess.run(
        [*command, "--skip-tokenizer-init", "--additional-config", json.dumps(infllm)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode != 0
    assert 'n_locl=1024: unknown field. Did you mean "n_local"?' in run.stdout + run.stderr


@pytest.mark.parametrize(
    ("on_cpu", "fields", "parts"),
    [
        (True, {"ops": "triton"}, ["ops='triton' needs a GPU", "remove it"]),
        (False, {"ops": "cpu"}, ["ops='cpu' needs the CPU platform", "a GPU of tomorrow", "remove it"]),
        (
            False,
            {"selection": "peak"},
            ["selection='peak' runs on the CPU platform only", "a GPU of tomorrow"],
        ),
    ],
)
def test_fields_of_another_platform(
    on_cpu: bool, fields: dict[str, Any], parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    platform = type(current_platform)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(platform, "is_cpu", lambda self: on_cpu)
    monkeypatch.setattr(platform, "device_name", "a GPU of tomorrow")
    with pytest.raises(ConfigError) as refusal:
        plugin.check_selection(InfLLMConfig(**fields))
        plugin.chosen_ops(InfLLMConfig(**fields))
    assert all(part in str(refusal.value) for part in parts)


def test_too_little_memory_stops_the_server(llama: str) -> None:
    """What only the worker can see is printed, too, and the server exits."""
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve", llama, "--attention-backend", "infllm"]
    infllm = {"infllm": {"host_memory_gib": 0.01}}
    run = subprocess.run(
        [
            *command,
            "--skip-tokenizer-init",
            "--max-model-len",
            "1000000",
            "--enforce-eager",
            "--additional-config",
            json.dumps(infllm),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode != 0
    assert "--max-model-len 1000000 needs" in run.stdout + run.stderr
    assert "GiB are missing" in run.stdout + run.stderr
