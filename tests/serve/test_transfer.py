"""Two instances in one process: the tokens of one, and blocks that are free in the end, whatever fails."""

from __future__ import annotations

import contextlib
import logging
import time

import msgspec
import pytest
import torch
import zmq
from small_engine import TickingClock, is_empty, prompts, request
from small_fleet import colocated, fleet_folder, pair, replace_params, small_instance

from benthic.errors import AdmissionError, OverloadedError, TransferError
from benthic.serve.messages import Remote
from benthic.serve.transfer import nixl
from benthic.serve.transfer.handshake import Region
from benthic.serve.transfer.memory import Handle, MappedPages, MemorySource, pull

PROMPT = list(range(20, 51))


def all_empty(*instances) -> bool:
    return all(is_empty(each) and each.stats().leased_blocks == 0 for each in instances)


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 1.0, "seed": 7},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3, "min_tokens": 4, "ignore_eos": False},
        {"repetition_penalty": 1.3, "frequency_penalty": 0.5, "presence_penalty": 0.4},
        {"logit_bias": {5: 2.0, 9: -1.0}, "temperature": 1.0, "seed": -1},
    ],
)
def test_a_prompt_that_is_pulled_goes_on_with_the_tokens_it_would_have_had(params: dict) -> None:
    asked = request("a", PROMPT, max_tokens=12, **params)
    expected = colocated([asked])["a"]
    with pair() as both:
        first = both.prefill(asked)
        assert first.remote.num_tokens == len(PROMPT)
        assert both.owner.stats().leased_blocks == 8
        assert both.decode(asked, first) == expected
        assert both.reader.stats().pulled_blocks == 8
        both.settle()
        assert all_empty(both.owner, both.reader)


def test_logprobs_and_counts_continue_across_the_hand_over() -> None:
    asked = request("a", PROMPT, max_tokens=3, logprobs=2)
    with pair() as both:
        first = both.prefill(asked)
        assert len(first.logprobs) == 1
        both.reader.add(replace_params(asked, output=first.tokens, pull=first.remote))
        deltas = []
        while both.reader.has_work:
            deltas += both.reader.step()
        assert [len(delta.logprobs) for delta in deltas] == [1, 1]
        assert deltas[-1].finish_reason == "length"


def test_a_reader_that_gets_no_first_token_computes_it_from_the_last_of_the_prompt() -> None:
    asked = request("a", PROMPT, max_tokens=6)
    with pair() as both:
        first = both.prefill(asked)
        both.reader.add(replace_params(asked, pull=first.remote))
        tokens = []
        while both.reader.has_work:
            tokens += [token for delta in both.reader.step() for token in delta.tokens]
        assert tokens == colocated([asked])["a"]
        assert both.reader.stats().pulled_blocks == 8


def test_many_prompts_with_shared_beginnings_pull_only_what_is_missing() -> None:
    shared = list(range(30, 60))
    asked = [
        request(f"r{i}", shared + tail, max_tokens=5, temperature=1.0, seed=i)
        for i, tail in enumerate(prompts(6, seed=5, longest=10))
    ]
    expected = colocated(asked)
    with pair() as both:
        for each in asked:
            first = both.prefill(each)
            assert both.decode(each, first) == expected[each.request_id]
        both.settle()
        pulled = both.reader.stats().pulled_blocks
        assert pulled < sum(-(-len(each.prompt) // 4) for each in asked) - 5 * (len(shared) // 4) + 6
        assert all_empty(both.owner, both.reader)


def test_a_prompt_the_reader_has_already_frees_the_owner_without_a_transfer() -> None:
    asked = request("a", [*PROMPT[:-3]], max_tokens=2)
    with pair() as both:
        both.decode(asked, both.prefill(asked))
        again = replace_params(asked, request_id="b")
        both.decode(again, both.prefill(again))
        both.settle()
        assert both.reader.stats().pulled_blocks == 7
        assert all_empty(both.owner, both.reader)


def test_models_that_differ_refuse_each_other_and_the_prompt_is_computed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = request("a", PROMPT, max_tokens=6)
    with pair(owner={"seed": 1}) as both, caplog.at_level(logging.WARNING):
        first = both.prefill(asked)
        tokens = both.decode(asked, first)
        assert len(tokens) == 6
        assert both.reader.stats().pulled_blocks == 0
    assert "the other instance refuses: model is " in caplog.text


def test_block_sizes_that_differ_are_named_with_both_values(caplog: pytest.LogCaptureFixture) -> None:
    asked = request("a", PROMPT, max_tokens=6)
    with pair(owner={"block_size": 8}) as both, caplog.at_level(logging.WARNING):
        first = both.prefill(asked)
        assert both.decode(asked, first) == colocated([asked])["a"]
    assert "block_size is 4 here and 8 there" in caplog.text


def test_a_lease_that_ran_out_is_not_believed_and_the_prompt_is_computed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = request("a", PROMPT, max_tokens=6)
    clock = TickingClock()
    with pair(owner={"clock": clock}) as both, caplog.at_level(logging.WARNING):
        first = both.prefill(asked)
        clock.now += 31.0
        both.owner.step()
        assert both.owner.stats().leased_blocks == 0
        other = request("b", list(range(60, 91)), max_tokens=1)
        both.owner.abort(both.prefill(other).remote.lease_id)
        assert both.decode(asked, first) == colocated([asked])["a"]
        assert both.reader.stats().pulled_blocks == 0
    assert "the lease 'a' ended before it was read" in caplog.text


def test_a_waiting_reader_keeps_its_lease_alive() -> None:
    asked = request("a", PROMPT, max_tokens=2)
    clock = TickingClock()
    with pair(owner={"clock": clock}, reader={"num_blocks": 12, "enable_prefix_caching": False}) as both:
        both.reader.add(request("before", range(2, 40), max_tokens=10))
        both.reader.step()
        first = both.prefill(asked)
        both.reader.add(replace_params(asked, output=first.tokens, pull=first.remote))
        until = time.monotonic() + 10
        while not both.owner._desk._renewed:
            assert time.monotonic() < until, "no renewal came"
            time.sleep(0.001)
        clock.now += 20.0
        both.owner.step()
        clock.now += 20.0
        both.owner.step()
        assert both.owner.stats().leased_blocks == 8


def test_an_owner_that_is_gone_is_given_up_and_the_prompt_is_computed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    asked = request("a", PROMPT, max_tokens=6)
    with pair(reader={"patience_s": 0.2}) as both, caplog.at_level(logging.WARNING):
        first = both.prefill(asked)
        both.owner._desk._closing.set()
        both.owner._desk._thread.join()
        assert both.decode(asked, first) == colocated([asked])["a"]
        assert is_empty(both.reader)
    assert "has not answered for" in caplog.text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"address": "tcp://not a host:9103"}, "cannot be called"),
        ({"address": "tcp://*:9103"}, "cannot be called"),
        ({"address": "tcp://nowhere.invalid:9103"}, "has not answered for"),
        ({"blocks": (0, 1, 2, 3, 4, 5, 6, 256)}, "but there are 256 there"),
        ({"blocks": (-1, *range(7))}, "but there are 256 there"),
        ({"blocks": (0, 1)}, "holds 2 blocks"),
        ({"lease_id": "another"}, "ended before it was read"),
    ],
)
def test_a_hand_over_that_is_wrong_costs_its_request_the_prompt_and_nobody_else_anything(
    fields: dict, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    asked = request("a", PROMPT, max_tokens=6)
    with pair(reader={"patience_s": 0.2}) as both, caplog.at_level(logging.WARNING):
        first = both.prefill(asked)
        wrong = msgspec.structs.replace(first, remote=msgspec.structs.replace(first.remote, **fields))
        assert both.decode(asked, wrong) == colocated([asked])["a"]
        assert words in caplog.text
        again = replace_params(asked, request_id="b", prompt=tuple(PROMPT[::-1]))
        assert both.decode(again, both.prefill(again)) == colocated([again])["b"]
        assert both.reader.stats().pulled_blocks == 8


def test_a_desk_that_hears_strange_words_goes_on() -> None:
    asked = request("a", PROMPT, max_tokens=6)
    with pair() as both, zmq.Context() as context, context.socket(zmq.DEALER) as stranger:
        stranger.connect(both.owner._desk.address)
        for frames in ([b""], [b"", b"\xff"], [b"a", b"b", b"c"]):
            stranger.send_multipart(frames)
            assert b"another kind" in stranger.recv()
        assert both.decode(asked, both.prefill(asked)) == colocated([asked])["a"]
        assert both.reader.stats().pulled_blocks == 8


def test_another_life_at_the_same_address_is_not_read(caplog: pytest.LogCaptureFixture) -> None:
    asked = request("a", PROMPT, max_tokens=6)
    with pair() as both, caplog.at_level(logging.WARNING):
        first = both.prefill(asked)
        old = Remote(
            **{**{n: getattr(first.remote, n) for n in Remote.__struct_fields__}, "instance_id": "x"}
        )
        both.reader.add(replace_params(asked, output=first.tokens, pull=old))
        tokens = list(first.tokens)
        while both.reader.has_work:
            tokens += [token for delta in both.reader.step() for token in delta.tokens]
        assert tokens == colocated([asked])["a"]
    assert "instance x is gone" in caplog.text


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_an_abort_at_any_moment_of_a_pull_frees_both_sides(steps: int) -> None:
    asked = request("a", PROMPT, max_tokens=6)
    with pair() as both:
        first = both.prefill(asked)
        both.reader.add(replace_params(asked, output=first.tokens, pull=first.remote))
        for _ in range(steps):
            both.reader.step()
        both.reader.abort("a")
        while both.reader.has_work:
            both.reader.step()
        both.settle()
        assert all_empty(both.owner, both.reader)


class Slow:
    """A copy that is made when it is waited for, or was looked at so often."""

    def __init__(self, copy, looks: int) -> None:
        self.copy, self.looks, self.waited = copy, looks, False

    def ended(self) -> bool:
        self.looks -= 1
        if self.looks < 0 and self.copy is not None:
            self.copy()
            self.copy = None
        return self.copy is None

    def wait(self) -> None:
        self.looks, self.waited = 0, True
        with contextlib.suppress(TransferError):
            self.ended()


def slowed(reader, looks: int, *, fails: bool = False) -> list[Slow]:
    """From the next pull on, copies of `reader` take so many looks."""
    made, enter = [], reader._reader._enter

    def entered(owner, welcome) -> None:
        enter(owner, welcome)
        start = owner.source.start

        def begin(remote_blocks, local_blocks) -> Slow:
            def copy() -> None:
                if fails:
                    msg = "the link broke"
                    raise TransferError(msg)
                start(remote_blocks, local_blocks)

            made.append(Slow(copy, looks))
            return made[-1]

        owner.source.start = begin

    reader._reader._enter = entered
    return made


def test_others_go_on_while_blocks_are_on_their_way() -> None:
    asked, other = request("a", PROMPT, max_tokens=6), request("b", range(60, 70), max_tokens=30)
    expected = colocated([asked, other])
    with pair() as both:
        made = slowed(both.reader, looks=36)  # three a step
        first = both.prefill(asked)
        both.reader.add(other)
        both.reader.add(replace_params(asked, output=first.tokens, pull=first.remote))
        tokens = {"a": list(first.tokens), "b": []}
        meanwhile = 0
        while both.reader.has_work:
            for delta in both.reader.step():
                tokens[delta.request_id] += delta.tokens
                meanwhile += any(copy.copy is not None for copy in made)
        assert tokens == expected
        assert meanwhile >= 10
        assert both.reader.stats().pulled_blocks == 8
        both.settle()
        assert all_empty(both.owner, both.reader)


def test_blocks_of_an_aborted_pull_are_given_away_after_its_copy() -> None:
    asked = request("a", PROMPT, max_tokens=6)
    with pair(reader={"num_blocks": 12, "enable_prefix_caching": False}) as both:
        made = slowed(both.reader, looks=1_000_000)
        first = both.prefill(asked)
        both.reader.add(request("b", range(60, 62), max_tokens=40))
        both.reader.add(replace_params(asked, output=first.tokens, pull=first.remote))
        until = time.monotonic() + 10
        while not made:
            assert time.monotonic() < until, "no copy has begun"
            both.reader.step()
        both.reader.abort("a")
        assert [copy.waited for copy in made] == [True] * len(made)
        both.reader.abort("b")
        after = request("c", PROMPT, max_tokens=6)
        both.reader.add(after)
        tokens = []
        while both.reader.has_work:
            tokens += [t for delta in both.reader.step() if delta.request_id == "c" for t in delta.tokens]
        assert tokens == colocated([after])["c"]
        both.settle()
        assert all_empty(both.owner, both.reader)


def test_a_copy_that_fails_on_its_way_is_computed_instead(caplog: pytest.LogCaptureFixture) -> None:
    asked = request("a", PROMPT, max_tokens=6)
    with pair() as both, caplog.at_level(logging.WARNING):
        slowed(both.reader, looks=3, fails=True)
        assert both.decode(asked, both.prefill(asked)) == colocated([asked])["a"]
        assert both.reader.stats().pulled_blocks == 0
        both.settle()
        assert all_empty(both.owner, both.reader)
    assert "the link broke; the prompt is computed here" in caplog.text


class Nixl:
    """An agent of NIXL whose reads end in a given state after so many looks."""

    def __init__(self, looks: int, state: str) -> None:
        self.looks, self.state, self.released = looks, state, 0

    def transfer(self, _handle: object) -> str:
        return "PROC"

    def check_xfer_state(self, _handle: object) -> str:
        self.looks -= 1
        return "PROC" if self.looks > 0 else self.state

    def release_xfer_handle(self, _handle: object) -> None:
        self.released += 1


def test_a_read_of_nixl_gives_its_handle_back_once_however_it_ends() -> None:
    good = nixl.Read(agent := Nixl(3, "DONE"), object())
    assert [good.ended() for _ in range(5)] == [False, False, True, True, True]
    assert agent.released == 1
    bad = nixl.Read(agent := Nixl(2, "ERR"), object())
    assert not bad.ended()
    with pytest.raises(TransferError, match="ended as 'ERR'"):
        bad.ended()
    bad.wait()
    assert not bad.ended()
    assert agent.released == 1
    nixl.Read(agent := Nixl(4, "ERR"), object()).wait()
    assert agent.released == 1


def test_an_abort_after_the_hand_over_frees_the_owner() -> None:
    with pair() as both:
        first = both.prefill(request("a", PROMPT))
        both.owner.abort(first.remote.lease_id)
        assert all_empty(both.owner)


def test_a_preempted_request_resumes_with_the_same_tokens_after_its_pull() -> None:
    asked = [
        request(f"r{i}", prompt, max_tokens=24, temperature=1.0, seed=i)
        for i, prompt in enumerate(prompts(4, seed=8, shortest=12, longest=20))
    ]
    expected = colocated(asked)
    with pair(reader={"num_blocks": 26, "enable_prefix_caching": False}) as both:
        tokens = {}
        for each in asked:
            first = both.prefill(each)
            tokens[each.request_id] = list(first.tokens)
            both.reader.add(replace_params(each, output=first.tokens, pull=first.remote))
        while both.reader.has_work:
            for delta in both.reader.step():
                tokens[delta.request_id] += delta.tokens
        assert both.reader.stats().preemptions > 0
        assert tokens == expected
        both.settle()
        assert all_empty(both.owner, both.reader)


def test_an_owner_full_of_leases_refuses_more_until_they_are_read() -> None:
    with pair(owner={"num_blocks": 20}) as both:
        asked = request("a", PROMPT, max_tokens=2)
        first = both.prefill(asked)
        with pytest.raises(OverloadedError, match="8 of the 10 that lease_share allows"):
            both.prefill(request("b", PROMPT))
        both.decode(asked, first)
        both.settle()
        both.prefill(request("b", PROMPT))


def test_output_outside_the_vocabulary_is_refused() -> None:
    with pair() as both, pytest.raises(AdmissionError, match="output holds token 9999"):
        both.reader.add(replace_params(request("a", PROMPT), output=(9999,)))


def test_a_cache_of_its_own_cannot_be_shared() -> None:
    with fleet_folder() as folder, pytest.raises(TransferError, match="share_pages=True"):
        small_instance(f"ipc://{folder}/a", share_pages=False)


def test_mapped_pages_are_seen_through_another_mapping() -> None:
    shape = (2, 3, 4, 5)
    pages = MappedPages(2 * 3 * 4 * 5 * 4)
    mine = pages.tensor(shape, torch.float32)
    mine.copy_(torch.arange(120.0).view(shape))
    local = torch.full((2, 7, 4, 5), torch.nan)
    source = MemorySource(pages.region(3), local)
    pull(source, [2, 0], [6, 1])
    assert torch.equal(local[:, 6], mine[:, 2])
    assert torch.equal(local[:, 1], mine[:, 0])
    assert local[:, [0, 2, 3, 4, 5]].isnan().all()


def test_pages_of_another_size_or_of_a_process_that_is_gone_are_refused() -> None:
    pages = MappedPages(480)
    local = torch.zeros(2, 3, 4, 5)
    with pytest.raises(TransferError, match=r"shares 480 bytes, but its terms make 640"):
        MemorySource(pages.region(4), local)
    import msgspec

    gone = Region(kind="memory", num_blocks=3, handle=msgspec.msgpack.encode(Handle(2**22 + 1, 3, 480)))
    with pytest.raises(TransferError, match="does not share its pages any more"):
        MemorySource(gone, local)


def test_without_nixl_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "nixl._api", None)
    with pytest.raises(TransferError, match="Install nixl"):
        nixl.NixlPages(torch.zeros(2, 3, 4, 5))
