import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

# Tests never need the network, and a stray look-up should fail at once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two OpenMP threads spinning for each other beside another process are 25 times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

LlamaFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Real data and models; tests that need them are skipped, saying so, where they are absent."""
    default = Path(__file__).parents[2] / "shared" / "data"
    # Absolute: tests link to it, and run commands in directories of their own.
    directory = Path(os.environ.get("DEEPEN_TEST_DATA", default)).resolve()
    if not directory.is_dir():
        pytest.skip(f"no test data at {directory}: set DEEPEN_TEST_DATA")
    return directory


@pytest.fixture(scope="module", autouse=True)
def _curves(request: pytest.FixtureRequest) -> Iterator[None]:
    """Pages of runs have no curves, but where pages are judged and in the demo's two runs."""
    judged = request.module.__name__ in ("test_report", "test_report_browser", "test_demo")
    with nullcontext() if judged else without_curves():
        yield


@contextmanager
def without_curves() -> Iterator[None]:
    """Leave the drawing out of the pages of runs: it takes as long as the rest of a tiny run."""
    from markupsafe import Markup

    from deepen.report import figures
    from deepen.report.svg import Chart

    def undrawn(name: str, title: str, *_: Any, **__: Any) -> Chart:
        return Chart(title, Markup("<svg></svg>"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "_over_tokens", undrawn)
        yield


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A real Chromium without a window, as playwright drives it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = os.environ.get("DEEPEN_CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine: set DEEPEN_CHROMIUM")
    with playwright.sync_playwright() as running:
        yield running.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What was asked of the hub: nothing leaves the machine."""
    import huggingface_hub

    calls: list[tuple[Any, ...]] = []

    def create(self: Any, repo_id: str, **options: Any) -> str:
        calls.append(("create", self.token, repo_id, options))
        return f"https://huggingface.co/{repo_id}"

    def upload(self: Any, *, repo_id: str, folder_path: str, **options: Any) -> None:
        held = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        calls.append(("upload", self.token, repo_id, held))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload)
    return calls


@pytest.fixture
def tiny_llama(tmp_path: Path) -> LlamaFactory:
    """Write a tiny real LlamaForCausalLM with every weight perturbed; return its directory.

    Keywords: name, blocks, tied, bias, dtype ("float32", "bfloat16"), sharded, seed, LlamaConfig fields.
    """

    def build(name: str = "base", **options: Any) -> Path:
        return write_tiny_llama(tmp_path / name, **options)

    return build


def write_tiny_llama(
    directory: Path,
    *,
    blocks: int = 4,
    tied: bool = False,
    bias: bool = False,
    dtype: str = "float32",
    sharded: bool = False,
    seed: int = 0,
    **config: Any,
) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            **{
                **sizes,
                **heads,
                "num_hidden_layers": blocks,
                "tie_word_embeddings": tied,
                "attention_bias": bias,
                "mlp_bias": bias,
                "bos_token_id": 1,
                "eos_token_id": 2,
                **config,
            }
        )
    ).to(getattr(torch, dtype))
    with torch.no_grad():
        # Fresh gains are all 1 and fresh biases all 0: perturbed, a tensor in the wrong place shows.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(directory, max_shard_size="12KB" if sharded else "5GB")
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    (directory / "LICENSE").write_text("a licence")
    return directory
