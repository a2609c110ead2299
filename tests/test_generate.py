"""generate: decoders generate through stages as they do without, in one process and on ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from cluster.matrix import on_ranks
from helpers import load
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_faults import outcomes
from test_given import Tower, X, assert_alike, tower_state
from torch import nn

from stagecut import Generator, InputError, SplitError, SplitPoint, StagecutError
from stagecut.backend.serve.caches import Caches, takes_over
from stagecut.backend.serve.stop import Stop
from stagecut.ir.text.printer import size_text
from stagecut.programs import Programs, beginnings_near

SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 64}
GREEDY = {"do_sample": False}
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 30, "top_p": 0.9, "repetition_penalty": 1.3, "eos_token_id": 7}


def _llama() -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_hidden_layers=3, **SIZE))


def _sliding() -> Any:
    return transformers.MistralForCausalLM(transformers.MistralConfig(num_hidden_layers=2, sliding_window=8, **SIZE))


def _mamba() -> Any:
    config = transformers.MambaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=64, state_size=4)
    return transformers.MambaForCausalLM(config)


def _t5() -> Any:
    size = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "vocab_size": 64}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(num_layers=2, decoder_start_token_id=0, **size))


def made(make: Callable[[], Any]) -> Any:
    """A model whose tokens differ from step to step."""
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return model


def prompts(length: int = 6) -> dict[str, torch.Tensor]:
    """Three prompts, two of them padded on the left."""
    torch.manual_seed(1)
    ids = torch.randint(8, 64, (3, length))
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    mask[1, :1] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def tokens(run: Any, *, length: int = 6, new: int = 12, **options: Any) -> torch.Tensor:
    """What `run.generate` returns, from a fixed random state."""
    torch.manual_seed(5)
    found: torch.Tensor = run.generate(**prompts(length), max_new_tokens=new, pad_token_id=0, **options)
    return found


def assert_equal_tokens(model: Any, generator: Generator, **options: Any) -> None:
    """Greedy and sampled."""
    seen: set[int] = set()
    for way in (GREEDY, SAMPLED):
        expected = tokens(model, **way, **options)
        assert torch.equal(tokens(generator, **way, **options), expected)
        seen.update(expected[:, -6:].flatten().tolist())
    assert len(seen) > 3, "the tokens tell nothing apart"


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Generator]:
    """A model, and its generator."""
    model = made(_llama)
    return model, Generator(model, stages=2)


# --- in one process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "options", "programs"),
    [
        (_llama, {"cache_implementation": "static"}, 2),
        (_sliding, {}, 4),
        (_mamba, {}, 2),
        (_t5, {}, 4),
    ],
    ids=["static", "sliding", "mamba", "t5"],
)
def test_tokens_are_those_of_the_model(make: Any, options: dict[str, Any], programs: int) -> None:
    model = made(make)
    generator = Generator(model, stages=2)
    assert_equal_tokens(model, generator, **options)
    assert len(generator.pipes) == programs
    assert all(pipe.num_stages == 2 for pipe in generator.pipes)


def test_one_set_of_weights_and_one_place_of_cuts(llama: tuple[Any, Generator]) -> None:
    model, generator = llama
    assert_equal_tokens(model, generator)
    assert len(generator.pipes) == 3
    assert generator.split_spec is not None
    assert len(generator.split_spec) == 1
    names = [[{*stage.state_dict()} for stage in pipe.stages] for pipe in generator.pipes]
    assert names[0] == names[1] == names[2]
    weight = model.model.layers[1].mlp.up_proj.weight
    for pipe in generator.pipes:
        assert pipe.get_parameter("model.layers.1.mlp.up_proj.weight") is weight


def test_other_lengths_and_batches_need_few_programs(llama: tuple[Any, Generator]) -> None:
    model, generator = llama
    tokens(generator)
    for length in (9, 4, 12):
        assert torch.equal(tokens(generator, length=length, new=5), tokens(model, length=length, new=5))
    assert len(generator.pipes) == 4


def test_the_report_says_what_a_request_costs() -> None:
    model = made(_llama)
    generator = Generator(model, split_spec={"model.layers.2": SplitPoint.BEGINNING})
    assert generator.report() == ""
    tokens(generator, new=10, cache_implementation="static")
    lines = [line.split() for line in generator.report().splitlines()]
    assert lines[0][:2] == ["stage", "weights"]
    layer = 2 * 3 * 2 * 15 * 8 * 4 + 8  # keys and values of 3 rows, 2 heads, 15 positions, and a counter
    assert [" ".join(line[-2:]) for line in lines[1:]] == [size_text(2 * layer), size_text(layer)]


def test_streamers_criteria_and_results_of_transformers(llama: tuple[Any, Generator]) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[int] = []

        def put(self, value: torch.Tensor) -> None:
            self.seen += value.flatten().tolist()

        def end(self) -> None:
            self.seen.append(-1)

    def few(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 9)

    results = []
    for run in llama:
        streamer = Streamer()
        one = {name: tensor[2:] for name, tensor in prompts().items()}
        found = run.generate(
            **one,
            max_new_tokens=12,
            do_sample=False,
            streamer=streamer,
            stopping_criteria=[few],
            return_dict_in_generate=True,
            output_scores=True,
        )
        scores = [score.tolist() for score in found.scores]
        results.append((streamer.seen, found.sequences.tolist(), scores))
        assert found.past_key_values.get_seq_length() == 8
    assert results[0] == results[1]


def _llava() -> Any:
    text = SIZE | {"model_type": "llama", "num_hidden_layers": 2, "vocab_size": 100}
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    eye = tower | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8}
    config = transformers.LlavaConfig(text_config=text, vision_config=eye, image_token_index=90)
    return transformers.LlavaForConditionalGeneration(config)


def test_a_model_that_sees_generates_from_other_pictures_in_other_places() -> None:
    model = made(_llava)
    generator = Generator(model, stages=2)
    pictures = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    results = []
    for place in (1, 4):  # where the picture is
        ids = torch.randint(8, 80, (3, 9), generator=torch.Generator().manual_seed(3))
        ids[:, place : place + 4] = 90
        for seen in (pictures, pictures.flip(0) * 2):
            call = GREEDY | {"input_ids": ids, "pixel_values": seen, "max_new_tokens": 8, "pad_token_id": 0}
            expected = model.generate(**call)
            assert torch.equal(generator.generate(**call), expected)
            results.append(expected[:, 9:].tolist())
    assert len({str(one) for one in results}) == 4, "the pictures change nothing"
    assert generator.split_spec is not None
    (cut,) = generator.split_spec  # which of them, the costs of the tower say
    assert cut in ("model.language_model.layers.0", "model.language_model.layers.1")
    assert len(generator.pipes) == 3


class Keeps(nn.Linear):
    """A layer with a part of the cache."""

    def forward(self, x: torch.Tensor, cache: dict[str, torch.Tensor], key: str) -> torch.Tensor:  # type: ignore[override]
        x = torch.tanh(super().forward(x))
        cache[key] = torch.cat([cache[key], x]) if key in cache else x * 1
        return x + cache[key].mean(0)


class Sees(nn.Module):
    """Looks at a picture in its first call, with many modules; each call runs two others that keep state."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.ModuleList(nn.Linear(4, 4) for _ in range(8))
        self.layers = nn.ModuleList(Keeps(4, 4) for _ in range(2))

    def forward(self, x: torch.Tensor, cache: dict[str, torch.Tensor], picture: torch.Tensor | None = None) -> torch.Tensor:
        if picture is not None:
            for module in self.tower:
                picture = torch.tanh(module(picture))
            x = x + picture
        for number, layer in enumerate(self.layers):
            x = layer(x, cache, str(number))
        return x


def test_cuts_fall_where_every_step_runs() -> None:
    torch.manual_seed(0)
    model = Sees().eval()
    programs = Programs(model, None, lambda program: [6])
    ours: dict[str, torch.Tensor] = {}
    theirs: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for more in ({"picture": X + 1}, {}, {}):
            call = {"x": X, "cache": ours} | more
            assert torch.equal(programs.fitting(call).run(call), model(X, theirs, **more))
            assert_alike(ours, theirs)
    assert [*(programs.spec or {})] == ["layers.0"]


# --- what cannot be ---------------------------------------------------------------------------------------


def test_no_stage_takes_longer_than_the_others() -> None:
    config = transformers.LlamaConfig(num_hidden_layers=8, **SIZE)
    generator = Generator(made(lambda: transformers.LlamaForCausalLM(config)), stages=4)
    tokens(generator)
    assert list(generator.split_spec or ()) == [f"model.layers.{n}" for n in (2, 4, 6)]


def test_what_cannot_generate_is_refused() -> None:
    with pytest.raises(InputError, match=r"Linear has no generate\(\)"):
        Generator(nn.Linear(2, 2), stages=2)
    with pytest.raises(InputError, match="train mode"):
        Generator(made(_llama).train(), stages=2)
    with pytest.raises(InputError, match="nothing says where to cut"):
        Generator(made(_llama))
    with pytest.raises(InputError, match="both say where to cut"):
        Generator(made(_llama), stages=2, split_spec={})


def test_a_model_that_generates_with_a_part_of_it_is_refused() -> None:
    model = made(_llama)

    class Around(type(model)):  # type: ignore[misc]
        def generate(self, **kwargs: Any) -> Any:
            return self.inner.generate(**kwargs)

    around = Around(model.config).eval()
    around.inner = model
    with pytest.raises(InputError, match=r"(?s)generate of Around never calls the model.*Generator\(model.language_model"):
        tokens(Generator(around, stages=2))


def test_a_model_in_train_mode_is_refused_in_each_call(llama: tuple[Any, Generator]) -> None:
    model, generator = llama
    model.train()
    try:
        with pytest.raises(InputError, match="train mode"):
            tokens(generator)
        with pytest.raises(InputError, match="train mode"):
            generator.generate_all([prompts()])
    finally:
        model.eval()


def test_a_weight_that_was_replaced_is_refused() -> None:
    model = made(_llama)
    generator = Generator(model, stages=2)
    tokens(generator)
    with torch.no_grad():
        model.lm_head.weight.mul_(-1)
    assert torch.equal(tokens(generator), tokens(model))
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.neg())
    with pytest.raises(StagecutError, match=r"parameter 'lm_head\.weight' of LlamaForCausalLM is another one than when it was cut"):
        tokens(generator)
    assert torch.equal(tokens(Generator(model, stages=2)), tokens(model))
    model.lm_head = nn.Sequential(model.lm_head)
    with pytest.raises(StagecutError, match=r"parameter 'lm_head\.(0\.)?weight'"):
        tokens(generator)


def test_the_programs_of_the_latest_calls_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stagecut.programs.MOST_PROGRAMS", 2)
    kinds = ["written", "replaced"]
    programs = Programs(Tower(kinds).eval(), {"layers.1": SplitPoint.BEGINNING}, None, None)

    def call(kind: str) -> None:
        cache, heads = tower_state(kinds)
        programs.fitting({"x": X, "cache": cache, "heads": heads | {kind: X}})

    with torch.no_grad():
        for kind in ("a", "a", "b", "a", "c", "c", "a"):
            call(kind)
        assert len(programs.pipes) == 2
        for kind in ("d", "e"):
            call(kind)
        with pytest.raises(StagecutError, match="each of 2 calls of Tower had to be traced"):
            call("f")


def test_a_request_that_is_too_long_is_refused() -> None:
    generator = Generator(made(_llama), stages=2, max_length=10)
    with pytest.raises(InputError, match="up to 18 tokens, and the generator was made for 10"):
        tokens(generator)


def test_cuts_that_find_no_place_say_what_to_name() -> None:
    program = load("clean")
    with pytest.raises(SplitError, match=r"not 2 places between modules(.|\n)*split_spec="):
        beginnings_near(program, [1, 2])


# --- loops of our own -------------------------------------------------------------------------------------


@settings(max_examples=4, deadline=None)
@given(st.lists(st.sampled_from(["grows", "replaced", "written", "shared"]), min_size=2, max_size=4))
def test_loops_over_state_of_several_kinds(kinds: list[str]) -> None:
    """Steps in a row, from the state that the step before has left."""
    torch.manual_seed(0)
    model = Tower(kinds).eval()
    programs = Programs(model, {"layers.1": SplitPoint.BEGINNING}, None, None)
    theirs, ours = tower_state(kinds), tower_state(kinds)
    with torch.no_grad():
        for step in range(4):
            x = X + step
            call = {"x": x, "cache": ours[0], "heads": ours[1]}
            assert torch.equal(programs.fitting(call).run(call), model(x, *theirs))
            assert_alike(ours, theirs)
    assert len(programs.pipes) <= 2


# --- on ranks ---------------------------------------------------------------------------------------------


def test_ranks_choose_the_same_tokens_and_nothing_of_a_cache_crosses() -> None:
    reports = on_ranks(2, _generate_on_rank)
    assert [report["equal"] for report in reports] == [[True] * 3] * 2
    assert [report["all"] for report in reports] == [[True] * 5] * 2
    assert [report["ahead"] for report in reports] == [[True] * 5] * 2
    assert [report["devices"] for report in reports] == [[True] * 10] * 2
    sent, told = reports[0]["sent"], reports[1]["told"]
    hidden = 3 * 32 * 4
    for step in sent:  # of decode steps
        assert hidden <= step <= 2 * hidden
    assert set(told) == {2 * 3 * 8}
    assert reports[1]["sent"] == reports[0]["told"] == []
    assert [report["cache"] for report in reports] == [["cpu", "cpu", "meta"], ["meta", "meta", "cpu"]]


def _generate_on_rank() -> dict[str, Any]:
    group = dist.group.WORLD
    assert group is not None
    equal = []
    model = made(_llama)
    generator = Generator(model, split_spec={"model.layers.2": SplitPoint.BEGINNING}, group=group)
    static = {"cache_implementation": "static"}
    for options in (SAMPLED | static, GREEDY | static | {"prefill_chunk_size": 3}):
        expected = tokens(model, **options)
        equal.append(torch.equal(tokens(generator, **options), expected))
    report: dict[str, Any] = {"sent": [], "told": [], "all": _requests_together(model, generator, static)}
    with _counting(report):
        options = static | {"return_dict_in_generate": True}
        found: Any = tokens(generator, **options)
    equal.append(torch.equal(found.sequences, tokens(model, **options).sequences))  # type: ignore[attr-defined]
    report["sent"] = report["sent"][1:]  # without the prefill
    # as on GPUs: steps are started before the tokens of the step before are there, on caches that are used again
    assert generator._tokens is not None
    generator._tokens.is_ahead = True
    generator._caches = Caches()
    report["ahead"] = _requests_together(model, generator, static)
    # as between GPUs: tokens are told where they are, and hosts do not wait for them
    generator._tokens.between_devices = generator._runs_ahead = True
    report["devices"] = _requests_together(model, generator, static)
    free = tokens(model, **GREEDY)
    for end in ([], *free[:, 8:10].tolist(), free[:, 7].tolist()):  # no row, some rows, and all of them end early
        options = GREEDY | static | {"eos_token_id": end or None}
        report["devices"].append(torch.equal(tokens(generator, **options), tokens(model, **options)))
    report["cache"] = [layer.keys.device.type for layer in found.past_key_values.layers]
    return report | {"equal": equal}


def _requests_together(model: Any, generator: Generator, static: dict[str, Any]) -> list[bool]:
    """More requests than lanes, of unlike lengths, sampled with a seed each; one prefills in parts."""
    ids = prompts()["input_ids"]
    requests = [
        GREEDY | {"input_ids": ids[:, 1:], "max_new_tokens": 13, "prefill_chunk_size": 3},
        SAMPLED | {"input_ids": ids, "max_new_tokens": 4},
        SAMPLED | {"input_ids": ids, "max_new_tokens": 12},
        SAMPLED | {"input_ids": ids, "max_new_tokens": 1},
        SAMPLED | {"input_ids": ids, "max_new_tokens": 12},
    ]
    requests = [static | {"pad_token_id": 0} | request for request in requests]
    expected = []
    for seed, request in enumerate(requests):
        torch.manual_seed(seed)
        expected.append(model.generate(**request))
    generator.lanes = 2
    found = generator.generate_all(requests, seeds=range(5))
    return [torch.equal(one, other) for one, other in zip(found, expected, strict=True)]


class _counting:
    """While open, the bytes of each step that are sent to the next stage, and told by the last one."""

    def __init__(self, report: dict[str, Any]) -> None:
        self._report = report
        self._step = 0

    def __enter__(self) -> None:
        self._send, self._broadcast = dist.isend, dist.broadcast

        def send(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            self._step += tensor.nbytes
            return self._send(tensor, *args, **kwargs)

        def broadcast(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if dist.get_rank() == 1:
                self._report["told"].append(tensor.nbytes)
            elif self._step:
                self._report["sent"].append(self._step)
                self._step = 0
            return self._broadcast(tensor, *args, **kwargs)

        dist.isend, dist.broadcast = send, broadcast

    def __exit__(self, *_: Any) -> None:
        dist.isend, dist.broadcast = self._send, self._broadcast


def test_each_rank_reads_its_stage_from_a_folder(tmp_path: Path) -> None:
    """The model is traced on the meta device, where counters are made; each rank has those of its own."""
    made(_llama).save_pretrained(tmp_path)
    assert on_ranks(2, _from_a_folder, str(tmp_path)) == [[True] * 3] * 2


def _from_a_folder(folder: str) -> list[bool]:
    model = made(_llama)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config).eval()
    group = dist.group.WORLD
    generator = Generator(empty, group=group, device="cpu", checkpoint=folder)
    ways = (GREEDY, GREEDY | {"cache_implementation": "static"}, SAMPLED | {"cache_implementation": "static"})
    return [torch.equal(tokens(generator, **way), tokens(model, **way)) for way in ways]


def test_a_rank_that_fails_stops_all() -> None:
    reports = outcomes(2, "file", _fail_on_rank)
    assert all(report.startswith("RankError: rank 1 (stage 1) failed: ValueError: no more") for report in reports)


def _fail_on_rank() -> str:
    generator = Generator(made(_llama), group=dist.group.WORLD)

    def few(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        if input_ids.shape[1] > 7:
            raise ValueError("no more")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)

    with pytest.raises(InputError, match="num_beams=2 needs the logits on every rank"):
        tokens(generator, num_beams=2)
    tokens(generator, stopping_criteria=[few])
    return "it went on"


def test_what_all_ranks_refuse_leaves_them_as_they_were() -> None:
    reports = on_ranks(2, _refused_on_rank)
    refused = ["InputError: num_beams=2", "InputError: guidance_scale=1.5", "InputError: assistant_model=", "ValueError: The following"]
    for report in reports:
        assert [text[: len(start)] for text, start in zip(report["refused"], refused, strict=False)] == refused
        assert report["refused"][4].startswith("InputError: a prompt of 6 tokens and what follows it are up to 36")
        assert report["refused"][5].startswith("CaptureError")
        assert report["refused"][6] == report["refused"][4]
        assert report["equal"] == [True, True]


def _refused_on_rank() -> dict[str, Any]:
    model = made(_llama)
    generator = Generator(model, group=dist.group.WORLD, lanes=2, max_length=30)
    short = GREEDY | prompts() | {"max_new_tokens": 3, "pad_token_id": 0}
    refused = []
    for options in (
        {"num_beams": 2},
        {"guidance_scale": 1.5},
        {"assistant_model": model},
        {"no_such_option": 1},
        {"max_new_tokens": 30},
        {"input_ids": torch.zeros(1, 0, dtype=torch.long), "attention_mask": None},
    ):
        refused.append(_error_of(lambda options=options: generator.generate(**short | options)))
    requests = [short, short | {"max_new_tokens": 30}, short | {"max_new_tokens": 9}]
    refused.append(_error_of(lambda: generator.generate_all(requests)))
    ways: tuple[dict[str, Any], ...] = (GREEDY, SAMPLED)
    return {"refused": refused, "equal": [torch.equal(tokens(generator, **way), tokens(model, **way)) for way in ways]}


def _error_of(action: Callable[[], Any]) -> str:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def test_what_one_rank_refuses_stops_all() -> None:
    reports = outcomes(2, "file", _refused_on_one_rank)
    assert all(report.startswith("RankError: rank 1 (stage 1) failed: a logits processor or a stopping") for report in reports)


def _refused_on_one_rank() -> str:
    generator = Generator(made(_llama), group=dist.group.WORLD)

    def asks_again(input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        generator._served(input_ids=input_ids)
        return scores

    tokens(generator, logits_processor=[asks_again])
    return "it went on"


def test_another_argument_on_one_rank_stops_all() -> None:
    reports = outcomes(2, "file", _longer_on_one_rank)
    assert all(report.startswith("RankError: rank 0 (stage 0) failed: a prompt of 6 tokens") for report in reports)


def _longer_on_one_rank() -> str:
    group = dist.group.WORLD
    generator = Generator(made(_llama), group=group, max_length=30)
    tokens(generator, new=20 if dist.get_rank(group) else 30)
    return "it went on"


def test_a_caller_keeps_its_own_cache(llama: tuple[Any, Generator]) -> None:
    """What was generated goes on from the cache that it left."""
    ids = prompts()["input_ids"][2:]
    found = []
    model, _ = llama
    for run in llama:
        cache: Any = transformers.DynamicCache(config=model.config)
        first = run.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
        again = run.generate(first, past_key_values=cache, max_new_tokens=4, do_sample=False)
        found.append((again.tolist(), cache.get_seq_length(), deepcopy(cache.layers[2].keys)))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[0][2], found[1][2])


def test_static_caches_serve_later_requests() -> None:
    """As with CUDA graphs, which belong to the cache on which they were made."""
    model = made(_llama)
    generator = Generator(model, stages=2, max_length=24)
    generator._caches = Caches()
    for length, new in ((6, 12), (9, 5), (6, 18)):
        options = SAMPLED | {"length": length, "new": new, "cache_implementation": "static"}
        assert torch.equal(tokens(generator, **options), tokens(model, **options))
    assert [len(free) for free in generator._caches._free.values()] == [1]
    assert len(generator.pipes) == 3  # two prefills, the second for any length, and one step


def test_a_request_on_a_used_cache_rounds_as_on_a_new_one() -> None:
    model = made(_llama).to(torch.bfloat16)
    generator = Generator(model, stages=2)
    generator._caches = Caches()
    seen: list[torch.Tensor] = []

    def note(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(scores.clone())
        return scores

    caches: set[int] = set()
    for run in (model, generator, generator, generator):
        tokens(run, do_sample=False, cache_implementation="static", logits_processor=[note])
        caches.update(id(cache) for free in generator._caches._free.values() for cache in free)
    assert len(caches) == 1, "the cache of the first request served all"
    scores = torch.stack(seen).unflatten(0, (4, -1))
    assert torch.equal(scores[1:], scores[:1].expand_as(scores[1:]))


class Held:
    def __init__(self, *parts: Any) -> None:
        self.parts = list(parts)
        self.length = len(parts)


def test_an_object_takes_over_what_another_holds_or_stays_as_it_was() -> None:
    kept = Held(torch.zeros(2), Held(torch.zeros(3)))
    own = kept.parts[1].parts[0]
    assert takes_over(kept, Held(torch.ones(2), Held(torch.ones(3))))
    assert kept.parts[1].parts[0] is own
    assert own.tolist() == [1, 1, 1]
    for other in (Held(torch.full((2,), 5.0), Held(torch.ones(4))), Held(torch.full((2,), 5.0)), Held(torch.full((2,), 5.0), [])):
        assert not takes_over(kept, other)
        assert (kept.length, kept.parts[0].tolist()) == (2, [1, 1])


# --- a host that is ahead of its device -------------------------------------------------------------------


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    ends=st.sets(st.integers(1, 15), max_size=3),
    rows=st.integers(1, 3),
    new=st.integers(1, 14),
    sampled=st.booleans(),
    options=st.sampled_from([{}, {"cache_implementation": "static"}, {"return_dict_in_generate": True}, {"max_time": 100.0}]),
)
def test_a_host_that_is_ahead_stops_where_the_loop_does(
    ends: set[int], rows: int, new: int, sampled: bool, options: dict[str, Any], stops: tuple[Any, Generator, list[Stop]]
) -> None:
    model, generator, _ = stops
    results = []
    for run in (model, generator):
        torch.manual_seed(rows)
        ids = torch.randint(1, 16, (rows, 5))
        length = {"max_new_tokens": new, "min_new_tokens": 1}
        result: Any = run.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=sampled, pad_token_id=0, eos_token_id=[*ends] or None, **length, **options
        )
        results.append((result if isinstance(result, torch.Tensor) else result.sequences, torch.get_rng_state()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_step_too_many_is_made_and_taken_off(stops: tuple[Any, Generator, list[Stop]]) -> None:
    model, generator, made_stops = stops
    made_stops.clear()
    ids = torch.arange(1, 6)[None]
    free = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert free.shape == (1, 13)
    for end, extra in ((None, 0), (int(free[0, 7]), 1)):
        options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": end}
        expected = model.generate(ids, **options)
        assert torch.equal(generator.generate(ids, **options), expected)
        assert made_stops[-1].extra == extra
    # with a streamer or a cache of the caller's it would leave traces
    for more in ({"streamer": transformers.TextStreamer(_Words())}, {"past_key_values": transformers.DynamicCache(config=model.config)}):
        count = len(made_stops)
        assert torch.equal(generator.generate(ids, **options, **more), expected)
        assert len(made_stops) == count


class _Words:
    def decode(self, *_: Any, **__: Any) -> str:
        return ""


@pytest.fixture(scope="module")
def stops() -> Iterator[tuple[Any, Generator, list[Stop]]]:
    """A model of few words, its generator on a host that is ahead, and what says when requests are over."""
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    config = transformers.LlamaConfig(num_hidden_layers=2, **SIZE | {"vocab_size": 16})
    model = transformers.LlamaForCausalLM(config).eval()
    model.generation_config.eos_token_id = None
    generator = Generator(model, stages=2)
    generator._runs_ahead = True
    seen: list[Stop] = []

    class Seen(Stop):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            seen.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("stagecut.generate.Stop", Seen)
        yield model, generator, seen
