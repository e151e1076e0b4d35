"""--compile and a GPU change the speed, not the result."""

import copy
import importlib
import shutil
from dataclasses import replace
from functools import partial

import pytest
import tensordict.nn
import torch
import tyro
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import hyper
import sac
from tests.conftest import ROOT, rows
from tests.test_scripts import COMMANDS

needs_compiler = pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
COMPILED = [script for script in COMMANDS if hasattr(importlib.import_module(script), "compiled")]
ARGS = hyper.Args(
    device="cpu",
    compile="on",
    hidden_sizes=(16,),
    critic_hidden_sizes=(16,),
    model_hidden_sizes=(16,),
    cost_hidden_sizes=(16,),
    bc_coef=10.0,
)


def batch_of(*shape: int) -> hyper.Batch:
    ends = (torch.rand(shape) < 0.3).float()
    return hyper.Batch(torch.randn(*shape, 3), torch.rand(*shape, 2) - 0.5, ends, torch.randn(*shape, 3), ends)


def draw(name: str) -> tuple:
    """Random inputs of an update of hyper.py, without the network that it trains and settings."""
    if name == "sac_update":
        return hyper.Cost(3, 2, ARGS), batch_of(32), batch_of(8), torch.randn(2, 32, 2)
    if name == "dynamics_update":
        return torch.randn(7, 32, 5), torch.randn(7, 32, 3)
    return batch_of(32), batch_of(32), torch.rand(32, 1)


NETWORKS = dict(sac_update=hyper.Agent, dynamics_update=hyper.EnsembleDynamics, cost_update=hyper.Cost)


def assert_twenty_updates_agree(name: str, args: hyper.Args) -> None:
    torch.manual_seed(0)
    eager = NETWORKS[name](3, 2, args)
    before, other, update = copy.deepcopy(eager), copy.deepcopy(eager), getattr(hyper, name)
    compiled = hyper.compiled(update, args)
    for _ in range(20):
        inputs = [batch_to(x, args.device) for x in draw(name)]
        results = update(eager, *inputs, args), compiled(other, *inputs, args)
    if results[0] is not None:
        torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)
    ours, theirs, old = (dict(module.named_parameters()) for module in (eager, other, before))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(not torch.equal(ours[name], old[name]) for name in ours if ours[name].requires_grad)


def batch_to(x, device: str):
    return hyper.Batch(*(field.to(device) for field in x)) if isinstance(x, hyper.Batch) else x.to(device)


@needs_compiler
@pytest.mark.parametrize("name", NETWORKS)
def test_twenty_compiled_updates_agree_with_eager_ones(name):
    assert_twenty_updates_agree(name, ARGS)


@needs_gpu
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_twenty_updates_in_cuda_graphs_agree_with_eager_ones(name, bf16):
    assert_twenty_updates_agree(name, replace(ARGS, device="cuda", bf16=bf16))


# ------------------------------------------------------------------------------ CUDA graphs, without a GPU
class Recorder(TorchDispatchMode):
    """Stands in for a CUDA graph: notes each operation on tensors, undoes what they changed, and repeats them."""

    def __enter__(self):
        self.operations, self.before = [], {}
        return super().__enter__()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function is not torch.ops.aten._local_scalar_dense.default, "waits for the GPU"
        assert torch.Tag.nondeterministic_seeded not in function.tags, "draws random numbers"
        for argument, value in zip(function._schema.arguments, args, strict=False):
            writes = (argument.alias_info and argument.alias_info.is_write) or argument.name.startswith("running_")
            for x in tree_leaves(value) if writes else ():  # batch normalisation does not say that it writes
                self.before.setdefault(id(x), (x, x.clone()))
        result = function(*args, **(kwargs or {}))
        self.operations.append((function, args, kwargs or {}, result))
        return result

    def __exit__(self, *error):
        super().__exit__(*error)
        for x, value in reversed(self.before.values()):
            x.detach().copy_(value)

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.operations:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if not torch.is_tensor(old) or old._is_zerotensor():
                    continue
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.detach().copy_(new)


class StandIn:
    """What tensordict's documentation says of CudaGraphModule: the first calls are ordinary ones, later ones replay; no
    input requires a gradient, tensors keep their shapes, and all else stays the same; outputs are copies."""

    def __init__(self, function, warmup: int):
        self.function, self.warmup, self.calls = function, warmup, 0

    def __call__(self, *inputs):
        inputs, self.calls = tree_map_only(torch.Tensor, torch.clone, inputs), self.calls + 1
        leaves = tree_leaves(inputs)
        assert not any(x.requires_grad for x in leaves if torch.is_tensor(x))
        if self.calls == self.warmup:
            self.places, tried = leaves, self.function(*tree_map_only(torch.Tensor, torch.clone, inputs))
            with Recorder() as self.recorder:
                self.outputs = self.function(*inputs)
            return tried
        if self.calls < self.warmup:
            return self.function(*inputs)
        for place, x in zip(self.places, leaves, strict=True):
            assert place.shape == x.shape if torch.is_tensor(x) else place == x
            place.copy_(x) if torch.is_tensor(x) else None
        self.recorder.replay()
        return tree_map_only(torch.Tensor, torch.clone, self.outputs)


def test_a_replay_is_the_update(monkeypatch):
    monkeypatch.setattr(tensordict.nn, "CudaGraphModule", StandIn)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    torch.manual_seed(0)
    args = sac.Args(device="cuda", compile="on", hidden_sizes=(8,))
    eager = sac.Agent(3, 2, replace(args, device="cpu"))
    other, loop = copy.deepcopy(eager), partial(sac.sac_updates, sac.sac_update)
    graph = sac.compiled(sac.sac_update, args, loop=sac.sac_updates)
    for _ in range(5):
        batches, noise, state = batch_of(2, 16), torch.randn(2, 2, 16, 2), torch.get_rng_state()
        torch.testing.assert_close(graph(other, batches, noise, args), loop(eager, batches, noise, args))
        assert torch.equal(torch.get_rng_state(), state)
    assert eager.actor_optimizer.t == other.actor_optimizer.t == 10 and graph.calls == 5
    torch.testing.assert_close(list(eager.parameters()), list(other.parameters()))


@pytest.mark.parametrize("kind", ["graphs", "whole"])
@pytest.mark.parametrize("script", COMPILED)
def test_updates_wait_for_nothing_and_draw_nothing(script, kind, tmp_path, monkeypatch):
    """A run with recorded updates has the eager run's rows; and each update is traced as a whole."""

    def compiled(function, args, loop=None):
        if kind == "whole":
            torch._dynamo.config.trace_autograd_ops = True
            function = torch.compile(function, fullgraph=True, backend="eager", dynamic=False)
        function = partial(loop, function) if loop else function
        return StandIn(function, warmup=3) if kind == "graphs" else function

    module = importlib.import_module(script)
    monkeypatch.chdir(ROOT)
    words = [*COMMANDS[script].replace("--total-timesteps 300", "--total-timesteps 120").split(), "--device", "cpu"]
    module.train(tyro.cli(module.Args, args=[*words, "--run-dir", str(tmp_path / "eager")]))
    monkeypatch.setattr(module, "compiled", compiled)
    module.train(tyro.cli(module.Args, args=[*words, "--run-dir", str(tmp_path / kind)]))
    assert rows(tmp_path / kind) == rows(tmp_path / "eager")


def test_tensordict_takes_our_inputs():
    """Its CudaGraphModule passes calls on where there is no GPU, once it has looked at them."""
    args = replace(ARGS, device="cpu", compile="off")
    with pytest.warns(UserWarning, match="without CUDA"):
        graphs = {name: tensordict.nn.CudaGraphModule(getattr(hyper, name), warmup=3) for name in NETWORKS}
    for name, graph in graphs.items():
        network = NETWORKS[name](3, 2, args)
        other, inputs = copy.deepcopy(network), draw(name)
        torch.testing.assert_close(graph(network, *inputs, args), getattr(hyper, name)(other, *inputs, args))


# ------------------------------------------------------------------------------------------------- choices
@pytest.mark.parametrize("length,choice", [(9_999, "off"), (10_000, "on")])
def test_long_runs_are_compiled(length, choice, monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert sac.pick_device(sac.Args(device="cpu", total_timesteps=length)).compile == choice
    assert capsys.readouterr().out == f"sac.py: --device cpu --compile {choice}\n"


def test_without_a_compiler_runs_are_eager_and_say_so(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", lambda function, **_: broken)
    args = sac.pick_device(sac.Args(device="cpu"))
    assert args.compile == "off" and sac.compiled(sac.sac_update, args) is sac.sac_update
    assert "torch.compile fails: RuntimeError('no g++')\nsac.py: --device cpu --compile off" in capsys.readouterr().out


def test_a_gpu_is_taken_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert sac.pick_device(sac.Args(compile="off")).device == "cuda"
    assert sac.pick_device(sac.Args(compile="off", device="cpu")).device == "cpu"
