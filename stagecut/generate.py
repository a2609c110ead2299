"""Any decoder generates through stages: `Generator`.

The loop is that of the model's own `generate`: it prepares masks and positions, processes logits, chooses
tokens and decides when to stop. Only the calls of the model in it are other ones: they run programs that were
cut into stages. On several ranks, every rank runs the loop. The last rank has the logits and chooses; the
others hear which tokens it chose, and choose the same.
"""

from __future__ import annotations

import copy
import math
import threading
from collections import deque
from collections.abc import (
    Callable,
    Iterable,
    Iterator,
    Mapping,
    MutableMapping,
    Sequence,
)
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from stagecut.backend.costs.balance import Balanced
from stagecut.backend.costs.ops import device
from stagecut.backend.costs.setting import Setting
from stagecut.backend.ranks.agree import Calls, announce
from stagecut.backend.ranks.faults import Faults
from stagecut.backend.serve.caches import Caches
from stagecut.backend.serve.line import Seat
from stagecut.backend.serve.stop import Stop
from stagecut.backend.serve.tokens import MOST_LANES, Tokens
from stagecut.backend.serve.turns import Turns
from stagecut.backend.tables import table
from stagecut.frontend.markers import SplitPoint
from stagecut.frontend.source import place_of
from stagecut.garbage import collected_seldom
from stagecut.ir.errors import InputError
from stagecut.ir.keywords import near_names_in
from stagecut.ir.text.printer import size_text
from stagecut.ir.types import value_bytes
from stagecut.pipe import Pipe
from stagecut.programs import Fit, Programs, Source
from stagecut.unwrapped import unwrapped


@near_names_in
class Generator:
    """A decoder that is cut into stages once for each kind of call, and generates through them.

    Arguments
    ---------
    model: a model with the `generate` of transformers, in eval mode. Its tensors are those of the stages.
    stages, split_spec, split_policy: where to cut, as for `pipeline`; `stages` defaults to the ranks of the
        group. A searched cut is moved to the nearest module in a list of modules, such as `layers.4`,
        because all programs are cut at the same places.
    group: the ranks that run a stage each, in the order of the stages. None runs all stages in this process.
    device: where the stages of this process run, and their part of every cache; the model's own by default.
    lanes: how many requests of `generate_all` are in flight together. Each has a cache of its own.
    max_length: the most tokens of a prompt and what follows it. Static caches are so long.
    checkpoint, init_fn: for a model on the meta device, where its weights come from, as for
        `Pipe.materialize`: each rank reads those of its stage. `init_fn` is the model's own by default.
    compile, cuda_graphs: decode steps with a static cache are compiled, and captured in CUDA graphs, one for
        each cache. The caches that `cache_implementation="static"` makes are kept for later requests of the
        same size, and a cache of your own that you `reset()` keeps its graph too.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: int | None = None,
        split_spec: Mapping[str, SplitPoint] | None = None,
        split_policy: Callable[..., Any] | None = None,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        lanes: int = 1,
        max_length: int | None = None,
        checkpoint: str | Path | None = None,
        init_fn: Callable[[nn.Module], Any] | None = None,
        compile: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        model = unwrapped(model)
        _refuse_other_models(model)
        _refuse_wishes(stages, split_spec, split_policy, group)
        self._model = model
        self.max_length = max_length
        if not 1 <= lanes <= MOST_LANES:
            raise InputError(f"lanes={lanes!r}", hint=f"1 to {MOST_LANES}")
        own = next(model.parameters()).device
        self.device = own if device is None else torch.device(device)
        if cuda_graphs and self.device.type != "cuda":
            raise InputError(
                f"cuda_graphs=True, and the stages run on {self.device}",
                hint="leave it away, or device='cuda'",
            )
        if self.device.type == "meta":
            raise InputError(
                "the model is on the meta device, which computes nothing",
                hint='Generator(model, device="cuda" or "cpu", checkpoint=FOLDER)',
            )
        self._seat = None if group is None else Seat(group, self.device)
        self._faults = None
        self._calls = None
        if group is not None:
            announce("Generator(...)", group)
            self._faults = Faults(group, range(dist.get_world_size(group)))
            self._calls = Calls(group, 0, self._faults)
            stages = stages or dist.get_world_size(group)
        policy: Any = split_policy
        if split_spec is None and policy is None:
            setting = _setting(stages, cuda_graphs)
            policy = Balanced(stages, setting, budget=math.inf, inside="never")
        source = Source(checkpoint, init_fn or getattr(model, "_init_weights", None))
        self._programs = Programs(
            model,
            split_spec,
            policy,
            self._seat,
            self.device,
            source,
            compile,
            cuda_graphs,
        )
        self._turns = Turns(self.device)
        self._caches = Caches() if cuda_graphs else None
        self.lanes = lanes
        self._tokens: Tokens | None = None
        if self._seat is not None:
            vocabulary = _vocabulary(model)
            self._tokens = Tokens(self._seat, vocabulary, self._turns.pass_on)
            if self._faults is not None and self._tokens.between_devices:
                self._faults.groups.append(self._tokens.group)
        self._own = threading.local()
        """Of the request in each thread: `crosses` when messages of it may be on their way between ranks."""
        self._early: Exception | None = None
        """The last error of a request of which nothing had crossed."""
        self._chooses = False
        """True while this rank alone works on its logits."""
        self._runs_ahead = self.device.type == "cuda"
        self._served = _served(model, self)

    @property
    def pipes(self) -> list[Pipe]:
        """The pipes so far, one for each kind of call, the latest first: prefills, decode steps."""
        return self._programs.pipes

    @property
    def split_spec(self) -> dict[str, SplitPoint] | None:
        """The places of the cuts; None before the first call where they are searched."""
        return self._programs.spec

    def report(self) -> str:
        """A table of what each stage holds: its parameters and buffers, and its part of the cache of one
        request. It is empty before the first call.
        """
        rows = [("stage", "weights", "cache of a request")]
        cache = self._programs.cache_bytes()
        for pipe in self.pipes[:1]:
            for block in pipe.program.stages:
                weights = sum(value_bytes(entry.type) or 0 for entry in block.state)
                size = size_text(cache.get(block.index, 0))
                rows.append((str(block.index), size_text(weights), size))
        return table(rows) if rows[1:] else ""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The same as `model.generate` with the same arguments; on every rank the same tokens.

        On several ranks every rank calls it alike. There, greedy decoding and sampling are known, and scores
        and logits in the result are those of the last rank only.
        """
        _refuse_train_mode(self._model)
        with self._together():
            result = self._request(args, kwargs)
            self._finish()
            return result

    def static_cache(self, make: Callable[..., Any], wishes: dict[str, Any]) -> Any:
        """A static cache for a request, by `make(**wishes)`, with the `wishes` of transformers."""
        longest = self.max_length
        if longest is not None:
            wishes["max_cache_len"] = max(longest, wishes["max_cache_len"])
        if self._caches is None:
            return make(**wishes)
        encoded = wishes["model_kwargs"].get("encoder_outputs")
        size = (
            wishes["cache_implementation"],
            wishes["batch_size"],
            wishes["max_cache_len"],
            None if encoded is None else encoded[0].shape[1],
        )
        return self._caches.take(size, lambda: make(**wishes))

    def generate_all(
        self, requests: Iterable[Mapping[str, Any]], seeds: Sequence[int] = ()
    ) -> list[Any]:
        """The results of several requests, each the keyword arguments of one call of `generate`.

        Up to `lanes` of them are in flight together, so that all stages have work. One that ends makes room
        for the next. A request with a seed in `seeds` gives the tokens that it gives alone after
        `torch.manual_seed`.
        """
        _refuse_train_mode(self._model)
        pending = deque(enumerate(requests))
        results: list[Any] = [None] * len(pending)
        refused: list[Exception] = []

        def lane() -> None:
            while pending:
                place, request = pending.popleft()
                if place < len(seeds):
                    torch.manual_seed(seeds[place])
                try:
                    results[place] = self._request((), request, alone=False)
                except Exception as error:
                    if self._faults is None or error is not self._early:
                        raise
                    refused.append(error)  # when the requests in flight are done

        if self._faults is None:
            with self._together():
                lane()
            return results
        with self._together():
            self._turns.run([lane] * min(self.lanes, len(pending)))
            self._finish()
            if refused:
                self._early = refused[0]
                raise self._early
        return results

    def _request(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], alone: bool = True
    ) -> Any:
        """The result of one request. An error before anything has crossed is noted as `_early`; where others
        are in flight, one before the first call of the model, which may give them their turns.
        """
        model: Any = self._served
        own = self._own
        own.alone, own.crosses, own.calls = alone, False, 0
        own.has_cache = kwargs.get("past_key_values") is not None
        if self._caches is not None:
            self._caches.forget()
        try:
            self._refuse_loops(kwargs)
            self._programs.refuse_replaced()
            result = model.generate(*args, **kwargs)
            self._turns.pass_on()
            if self.device.type == "cuda":
                # the host was ahead; its caches are for requests on other streams now
                torch.cuda.current_stream(self.device).synchronize()
            if own.calls == 0:
                raise InputError(
                    f"generate of {type(self._model).__name__} never calls the model: nothing runs in stages",
                    where=place_of(type(self._model)),
                    hint="if it generates with a part of the model, make a generator of that part: "
                    "Generator(model.language_model, ...), and give it what comes before as inputs_embeds",
                )
            if self._caches is not None:
                self._caches.finish(result)
            return result
        except Exception as error:
            if not self._own.crosses:
                self._early = error
            raise

    @contextmanager
    def _together(self) -> Iterator[None]:
        """All ranks do the work inside together. What all of them raise before anything has crossed leaves
        them as they were: the next request is served. Any other error stops all.
        """
        if self._faults is None or self._calls is None:
            with collected_seldom():
                yield
            return
        self._calls.announce("generate of a Generator")
        with collected_seldom(), self._faults.together():
            try:
                yield
            except Exception as error:
                if error is not self._early:
                    raise
                with self._faults.alike():
                    raise

    def _finish(self) -> None:
        self._programs.finish()
        if self._tokens is not None:
            self._tokens.finish()

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The result of one call of the model in the loop, from the stages."""
        if args:
            raise InputError(
                "the model is called with positional arguments in generate"
            )
        if self._chooses:
            raise InputError(
                "a logits processor or a stopping criterion calls the model, and only the last rank runs it",
                hint="a generator in one process",
            )
        self._own.calls += 1
        self._own.crosses |= not self._own.alone
        if self._tokens is not None:
            self._tokens.before_call()
        given = {name: part for name, part in kwargs.items() if part is not None}
        fit = self._programs.fitting(given)
        self._own.crosses = True
        with torch.no_grad():
            result = fit.run(given)
            if self._own.calls == 1:
                self._continue_on_used_caches(result)
        return self._with_logits(result, fit)

    def _continue_on_used_caches(self, result: Any) -> None:
        """The loop goes on with the cache in the result of the prefill, and CUDA graphs with its tensors."""
        if self._caches is None or not isinstance(result, MutableMapping):
            return
        for name, part in result.items():
            result[name] = self._caches.used_before(part)

    def _with_logits(self, result: Any, fit: Fit) -> Any:
        """The result; where the logits are on another rank, with those by which its tokens are chosen."""
        if self._tokens is None or self._tokens.chooses:
            return result
        rows = int(result.logits.shape[0])
        result.logits = self._tokens.as_logits(rows)
        return result

    def checked(self, criteria: Any) -> Any:
        """The stopping `criteria` of a request, which say the same on all ranks."""
        kind: Any = type(criteria)
        tokens = self._tokens

        def tell(this: Any, input_ids: torch.Tensor, scores: Any, **more: Any) -> Any:
            assert tokens is not None
            with self._choice():
                done = kind.__call__(this, input_ids, scores, **more)
            tokens.tell(input_ids[:, -1], done)
            return done

        def hear(_: Any, input_ids: torch.Tensor, *__: Any, **___: Any) -> Any:
            assert tokens is not None
            assert tokens.done is not None
            return tokens.done.to(input_ids.device)

        told = kind.__call__
        if tokens is not None:
            told = tell if tokens.chooses else hear

        def rows(this: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            done = told(this, input_ids, *args, **kwargs)
            stop: Stop | None = getattr(self._own, "stop", None)
            return done if stop is None else stop.rows(done, input_ids.shape[1])

        criteria.__class__ = type(kind.__name__, (kind,), {"__call__": rows})
        return criteria

    def loop(self, sample: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The tokens that a loop of transformers, `sample`, returns for a request. It chooses token after
        token.
        """
        stop = self._stop(**kwargs) if self._runs_ahead else None
        self._own.stop = stop
        try:
            result = sample(*args, **kwargs)
        finally:
            self._own.stop = None
        if stop is not None and stop.extra:
            return result[:, : -stop.extra]
        return result

    def _stop(
        self,
        stopping_criteria: Any = (),
        generation_config: Any = None,
        streamer: Any = None,
        **_: Any,
    ) -> Stop | None:
        """How the host knows when a request is over; None where it has to wait for its device after each
        token.

        A step too many must leave no trace: in random numbers, in a streamer, or in a cache of the caller's.
        """
        names = [type(criterion).__name__ for criterion in stopping_criteria]
        if "MaxLengthCriteria" not in names or generation_config is None:
            return None
        longest = stopping_criteria.max_length
        if set(names) == {"MaxLengthCriteria"}:
            return Stop(longest, by_tokens=False)
        leaves_traces = (
            generation_config.do_sample
            or generation_config.return_dict_in_generate
            or streamer is not None
            or self._own.has_cache
            or set(names) != {"MaxLengthCriteria", "EosTokenCriteria"}
        )
        return None if leaves_traces else Stop(longest, by_tokens=True)

    def processors(self, processors: Any) -> Any:
        """The logits processors of this rank: none where the logits are on another one."""
        if self._tokens is None:
            return processors
        kind: Any = type(processors)
        if not self._tokens.chooses:
            return kind()

        def process(this: Any, *args: Any, **kwargs: Any) -> Any:
            with self._choice():
                return kind.__call__(this, *args, **kwargs)

        processors.__class__ = type(kind.__name__, (kind,), {"__call__": process})
        return processors

    @contextmanager
    def _choice(self) -> Iterator[None]:
        """Inside, only the last rank runs, and no call of the model can be."""
        self._chooses = True
        try:
            yield
        finally:
            self._chooses = False

    def check(self, config: Any, length: int) -> None:
        """Returns for a request with this `config` that can be served with so many tokens in all, `length`;
        raises InputError for another one.
        """
        longest = self.max_length
        if longest is not None and config.max_length > longest:
            raise InputError(
                f"a prompt of {length} tokens and what follows it are up to {config.max_length} tokens, and "
                f"the generator was made for {longest}",
                hint="a shorter prompt, fewer max_new_tokens, or Generator(max_length=)",
            )
        self._refuse_loops({name: getattr(config, name, None) for name in _PLAIN})

    def _refuse_loops(self, request: Mapping[str, Any]) -> None:
        if self._seat is not None:
            _refuse_loops(request)


_LOOPS = "transformers.generation.utils"
"""Where the loops are that `Stop` knows; a model may have one of its own."""

_PLAIN: dict[str, Any] = {
    "num_beams": 1,
    "penalty_alpha": None,
    "prompt_lookup_num_tokens": None,
    "assistant_model": None,
    "assistant_early_exit": None,
    "use_mtp": False,
    "dola_layers": None,
    "guidance_scale": 1,
    "custom_generate": None,
}
"""Options of `generate` that choose another loop than greedy decoding or sampling, or that call the model
where tokens are chosen -> the value that does not.
"""


def _refuse_loops(options: Mapping[str, Any]) -> None:
    for name, plain in _PLAIN.items():
        value = options.get(name)
        if value is None or value == plain:
            continue
        shown = f"{name}={value!r}"
        if not isinstance(value, (int, float, str)):
            shown = f"{name}="
        raise InputError(
            f"{shown} needs the logits on every rank, and only the last has them",
            hint="greedy decoding or sampling; or a generator in one process",
        )


def _refuse_other_models(model: nn.Module) -> None:
    if not isinstance(model, nn.Module) or not hasattr(model, "generate"):
        raise InputError(
            f"{type(model).__name__} has no generate()",
            hint="a model of transformers for generation, such as AutoModelForCausalLM makes; another one "
            "runs in a loop of your own, by pipe(...) or driver.eval(...)",
        )
    _refuse_train_mode(model)


def _refuse_train_mode(model: nn.Module) -> None:
    if model.training:
        raise InputError(
            f"{type(model).__name__} is in train mode",
            where=place_of(type(model)),
            hint="model.eval()",
        )


def _refuse_wishes(stages: Any, spec: Any, policy: Any, group: Any) -> None:
    wishes = {"stages": stages, "split_spec": spec, "split_policy": policy}
    names = [f"{name}=" for name, wish in wishes.items() if wish is not None]
    if len(names) > 1:
        raise InputError(
            f"{' and '.join(names)} both say where to cut", hint="give one of them"
        )
    if not names and group is None:
        raise InputError(
            "nothing says where to cut",
            hint='stages=2, or split_spec={"model.layers.4": SplitPoint.BEGINNING}',
        )


def _setting(stages: int | None, replayed: bool) -> Setting:
    """Requests keep all stages at work, so the slowest of them counts; a graph that is `replayed` leaves the
    host nothing to do.
    """
    card = device("H100")
    if replayed:
        card = replace(card, starting=0.0)
    return Setting(card, training=False, n_microbatches=4 * (stages or 1))


def _vocabulary(model: nn.Module) -> int:
    config: Any = getattr(model, "config", None)
    text = config.get_text_config(decoder=True)
    return int(text.vocab_size)


def _served(model: nn.Module, generator: Generator) -> nn.Module:
    """`model` as its own `generate` sees it, with calls that go to `generator`."""
    kind: Any = type(model)

    def call(_: Any, *args: Any, **kwargs: Any) -> Any:
        return generator.call(*args, **kwargs)

    def criteria(this: Any, *args: Any, **kwargs: Any) -> Any:
        return generator.checked(kind._get_stopping_criteria(this, *args, **kwargs))

    def processor(this: Any, *args: Any, **kwargs: Any) -> Any:
        processors = kind._get_logits_processor(this, *args, **kwargs)
        return generator.processors(processors)

    def length(this: Any, *args: Any, **kwargs: Any) -> Any:
        config = kind._prepare_generated_length(this, *args, **kwargs)
        generator.check(config, kwargs["input_ids_length"])
        return config

    def static(this: Any, **wishes: Any) -> Any:
        make = kind._prepare_static_cache
        return generator.static_cache(
            lambda **final: make(this, **final),
            wishes,
        )

    def no_compile(*_: Any, **__: Any) -> bool:
        return False

    own_loop: Any = getattr(kind, "_sample", None)

    def sample(this: Any, *args: Any, **kwargs: Any) -> Any:
        return generator.loop(own_loop, this, *args, **kwargs)

    methods: dict[str, Any] = {
        "device": property(lambda _: generator.device),
        "__call__": call,
        "_get_stopping_criteria": criteria,
        "_get_logits_processor": processor,
        "_prepare_generated_length": length,
        "_prepare_static_cache": static,
        "_valid_auto_compile_criteria": no_compile,
    }
    if getattr(own_loop, "__module__", "") == _LOOPS:
        methods["_sample"] = wraps(own_loop)(sample)
    served = copy.copy(model)
    object.__setattr__(
        served,
        "__class__",
        type(kind.__name__, (kind,), methods),
    )
    return served
