"""Groups of a layout connect before anything else takes memory."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist  # noqa: TID251 (what is tested)
from torch.testing._internal.distributed.fake_pg import FakeStore

from benthic.parallel.mesh import Mesh
from benthic.spec.layout import Layout


@pytest.mark.parametrize(
    ("layout", "named"),
    [
        (Layout(), ()),
        (Layout(pp_degree=4, schedule="1f1b"), ("world",)),
        (
            Layout(dp_degree=4, ep_degree=2),
            ("world", "dense", "sharded", "expert_dp", "data"),
        ),
        (
            Layout(tp_degree=2, dp_degree=2),
            ("world", "dense", "sharded", "expert_dp", "tensor", "tokens", "data"),
        ),
    ],
    ids=["one rank", "pipeline", "experts", "tensor"],
)
def test_every_group_of_collectives_connects_once(layout: Layout, named: tuple[str, ...]) -> None:
    if layout.ranks > 1:
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=layout.ranks)
    try:
        mesh = Mesh.of(layout, 0)
        with mock.patch.object(dist, "all_reduce") as summed:
            mesh.connect(torch.device("cpu"))
        found = [call.kwargs["group"] for call in summed.call_args_list]
        assert found == [getattr(mesh, name).handle for name in named]
    finally:
        if layout.ranks > 1:
            dist.destroy_process_group()
