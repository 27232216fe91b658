"""Compiling and precision: the model is one graph without breaks, and the quantizer computes in fp32."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from modeling_pose_tokenizer import PoseTokenizerModel
from models import random_poses, small_config, train_model, trained_model

# Ten numbers of code steps, of whole and of broken ones: the loop over them is unrolled, a graph for each.
LENGTHS = (24, 21, 30, 17, 12, 15, 3, 6, 9, 26)
# torch.compile gives up on further lengths and runs them as they are.
MAX_GRAPHS = torch._dynamo.config.recompile_limit

KINDS: dict[str, Callable[[PoseTokenizerModel, torch.Tensor], Any]] = {
    "train": lambda model, poses: model(poses).loss,
    "eval": lambda model, poses: model(poses).pose_values,
    "encode": lambda model, poses: model.encode(poses).pose_codes,
    "decode": lambda model, codes: model.decode(codes).pose_values,
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


@pytest.fixture(scope="module")
def models() -> list[PoseTokenizerModel]:
    """Twice the same, with little in it: tracing takes its time."""
    config = small_config("whole", num_quantizers=1, num_part_layers=1)
    return [train_model(config, seed=0, steps=2, batch=4, frames=24) for _ in range(2)]


def compile_counting(run: Callable[..., Any]) -> tuple[Callable[..., Any], list[int]]:
    """`run` compiled, and a list that each graph is added to."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    return torch.compile(run, backend=backend), graphs


def arguments_of(kind: str, model: PoseTokenizerModel, frames: int) -> Any:
    poses = random_poses(model.config, 2, frames, seed=frames)
    return model.encode(poses).pose_codes if kind == "decode" else poses


@pytest.mark.parametrize("kind", KINDS)
def test_one_graph_without_breaks_gives_the_same(kind: str, models: list[PoseTokenizerModel]) -> None:
    run, (compiled, graphs) = KINDS[kind], compile_counting(KINDS[kind])
    results = []
    for function, model in zip((run, compiled), models, strict=True):
        model.train(kind == "train")
        torch.manual_seed(0)  # which levels are dropped, and where dead codes go
        results.append(function(model, arguments_of(kind, model, 14)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert len(graphs) == 1 and not counters["graph_break"]


@pytest.mark.slow
def test_varying_lengths_compile_a_bounded_number_of_graphs(models: list[PoseTokenizerModel]) -> None:
    model, (compiled, graphs) = models[0].eval(), compile_counting(KINDS["encode"])
    for _ in range(2):
        for frames in LENGTHS:
            poses = arguments_of("encode", model, frames)
            assert torch.equal(compiled(model, poses), model.encode(poses).pose_codes)
        first = len(graphs)
    assert 1 <= len(graphs) == first <= MAX_GRAPHS
    assert not counters["graph_break"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", ["parts", "fsq"])
def test_the_quantizer_computes_in_fp32_under_autocast(
    variant: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = train_model(small_config(variant), seed=0, steps=1, batch=4, frames=24)
    quantizer = model.quantizer
    seen: set[tuple[str, torch.dtype]] = set()

    def watch(name: str) -> None:
        function = getattr(quantizer, name)

        def watched(*arguments: Any) -> Any:
            result = function(*arguments)
            tensors = [each for each in (*arguments, result) if torch.is_tensor(each) and each.is_floating_point()]
            seen.update((name, each.dtype) for each in tensors)
            product = torch.ones(2, 2) @ torch.ones(2, 2)  # what a product made here would be
            seen.add((name, product.dtype))
            return result

        monkeypatch.setattr(quantizer, name, watched)

    for name in ("lookup", "read", "learn"):
        watch(name)
    network = []
    model.decoder.group_unpooling.register_forward_hook(
        lambda *now: network.append(torch.ones(2, 2).mm(torch.ones(2, 2)).dtype)
    )
    with torch.autocast("cpu", dtype):
        model(random_poses(model.config, 2, 24, seed=5)).loss.backward()
    assert seen == {(name, torch.float32) for name in ("lookup", "read", "learn")}
    assert network == [dtype]  # the test can see autocast
    assert all(buffer.dtype == torch.float32 for buffer in quantizer.buffers() if buffer.is_floating_point())


@pytest.mark.slow
def test_inductor_gives_the_codes_of_the_eager_model() -> None:
    model = trained_model("whole")
    compiled = torch.compile(KINDS["encode"], fullgraph=True)  # from the second length on with dynamic shapes
    for frames in LENGTHS[:3]:
        poses = arguments_of("encode", model, frames)
        with torch.no_grad():
            assert (compiled(model, poses) != model.encode(poses).pose_codes).float().mean() <= 1e-3
