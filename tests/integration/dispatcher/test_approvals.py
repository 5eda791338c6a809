"""Messages to runs and approvals, as rows: what counts as decided, who may say something, and that nothing is said twice."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from netra import errors, ids
from netra.context import UserExecutionContext
from services.dispatcher import approvals, runs, store_waits
from tests.fixtures import queued

pytestmark = pytest.mark.multi_user


@dataclasses.dataclass(frozen=True, slots=True)
class Asked:
    """A run that has asked for an approval."""

    owner: ids.UserId
    thread: ids.ThreadId
    claim: runs.Claim
    wanted: approvals.Wanted

    @property
    def run_id(self) -> ids.RunId:
        return self.claim.order.run_id


def _user() -> ids.UserId:
    return ids.UserId(ids.uuid7())


def _context(asked_by: ids.UserId, thread: ids.ThreadId, run_id: ids.RunId) -> UserExecutionContext:
    return UserExecutionContext.from_request(
        user_id=asked_by, tenant_id=ids.uuid7(), session_id=ids.uuid7(), thread_id=thread, run_id=run_id, request_id=ids.uuid7(),
        roles=("user",), tier="free",
    )  # fmt: skip


async def asked(queue: queued.Queue, *, quorum: int = 1, expires_s: float = 600.0) -> Asked:
    """A run of a new user's that has asked, and is suspended until it is answered."""
    owner, thread = _user(), ids.ThreadId.new()
    run_id = await queue.start(owner, thread_id=thread)
    (claim,) = [claim for claim in await queue.claim(most=50) if claim.order.run_id == run_id]
    wanted = approvals.Wanted(ids.uuid7(), run_id, "1:approve", "Delete it all?", quorum, expires_s, "files.delete", {"path": "/x"})
    found = await queue.waits.ask(wanted, _context(owner, thread, run_id))
    assert (found.state, found.votes, found.parameters) == ("pending", (), {"path": "/x"})
    assert await queue.everyone.suspended(run_id, claim.epoch, "approval", expires_s, asked=[wanted.approval_id])
    return Asked(owner, thread, claim, wanted)


async def test_the_owners_vote_approves_and_wakes_the_run(queue: queued.Queue) -> None:
    one = await asked(queue)
    assert await queue.claim() == []
    found = await queue.mine.vote(one.owner, one.wanted.approval_id, "approve", "Do it.")
    assert (found.state, [(vote.user_id, vote.comment) for vote in found.votes]) == ("approved", [(one.owner, "Do it.")])
    assert [claim.order.run_id for claim in await queue.claim()] == [one.run_id]
    assert await queue.waits.approval(one.run_id, one.wanted.approval_id) == found


async def test_what_is_asked_for_twice_is_one_approval(queue: queued.Queue) -> None:
    one = await asked(queue)
    await queue.mine.vote(one.owner, one.wanted.approval_id, "approve", "")
    found = await queue.waits.ask(one.wanted, _context(one.owner, one.thread, one.run_id))
    assert (found.state, len(found.votes)) == ("approved", 1)
    assert len(await queue.mine.approvals(one.owner, run_id="", state="", after="", size=10)) == 1


async def test_a_quorum_is_so_many_users_of_the_thread(queue: queued.Queue) -> None:
    one = await asked(queue, quorum=2)
    writer = _user()
    assert (await queue.mine.vote(one.owner, one.wanted.approval_id, "approve", "")).state == "pending"
    assert await queue.claim() == []
    found = await queue.mine.vote(writer, one.wanted.approval_id, "approve", "Me too.", one.thread)
    assert (found.state, {vote.user_id for vote in found.votes}) == ("approved", {one.owner, writer})
    assert len(await queue.claim()) == 1


async def test_two_who_vote_at_the_same_moment_are_both_counted(queue: queued.Queue) -> None:
    for _ in range(10):
        one = await asked(queue, quorum=2)
        async with asyncio.TaskGroup() as group:
            group.create_task(queue.mine.vote(one.owner, one.wanted.approval_id, "approve", ""))
            group.create_task(queue.mine.vote(_user(), one.wanted.approval_id, "approve", "", one.thread))
        assert (await queue.waits.approval(one.run_id, one.wanted.approval_id)).state == "approved"


async def test_the_first_who_rejects_decides(queue: queued.Queue) -> None:
    one = await asked(queue, quorum=3)
    await queue.mine.vote(one.owner, one.wanted.approval_id, "approve", "")
    found = await queue.mine.vote(_user(), one.wanted.approval_id, "reject", "No.", one.thread)
    assert found.state == "rejected"
    with pytest.raises(errors.FailedPrecondition, match="is rejected"):
        await queue.mine.vote(_user(), one.wanted.approval_id, "approve", "", one.thread)
    assert len(await queue.claim()) == 1


@pytest.mark.parametrize("quorum", [1, 2])
async def test_the_same_vote_again_changes_nothing_and_another_one_is_refused(queue: queued.Queue, quorum: int) -> None:
    one = await asked(queue, quorum=quorum)
    first = await queue.mine.vote(one.owner, one.wanted.approval_id, "approve", "Yes.")
    assert await queue.mine.vote(one.owner, one.wanted.approval_id, "approve", "Yes, again.") == first
    with pytest.raises(errors.FailedPrecondition, match="said approve"):
        await queue.mine.vote(one.owner, one.wanted.approval_id, "reject", "")
    assert len(first.votes) == 1


async def test_an_approval_expires_by_the_time_of_the_database(queue: queued.Queue) -> None:
    one = await asked(queue)
    await queue.admin.execute("UPDATE dispatcher.approvals SET expires_at = now() - interval '1 second'")
    # nobody has looked yet: it has expired all the same
    assert (await queue.mine.approval(one.owner, one.wanted.approval_id)).state == "expired"
    assert await queue.mine.approvals(one.owner, run_id="", state="pending", after="", size=10) == []
    with pytest.raises(errors.FailedPrecondition, match="is expired"):
        await queue.mine.vote(one.owner, one.wanted.approval_id, "approve", "")
    found = await queue.waits.approval(one.run_id, one.wanted.approval_id)
    assert (found.state, found.resolved_at) == ("expired", found.expires_at)


async def test_what_was_not_decided_expires_with_its_run(queue: queued.Queue) -> None:
    one = await asked(queue)
    await queue.mine.cancel(one.owner, one.run_id)
    (claim,) = await queue.claim()
    assert await queue.everyone.finishing(one.run_id, claim.epoch, {}) is not None
    with pytest.raises(errors.FailedPrecondition, match="ended"):
        await queue.mine.vote(one.owner, one.wanted.approval_id, "approve", "")
    await queue.everyone.ended(one.run_id, claim.epoch, runs.RunState.CANCELLED, b"", {}, context_open=False)
    assert (await queue.mine.approval(one.owner, one.wanted.approval_id)).state == "expired"


async def test_strangers_find_no_approval(queue: queued.Queue) -> None:
    one, other = await asked(queue), await asked(queue)
    for granted in ("", other.thread, ids.uuid7()):
        with pytest.raises(errors.NotFound):
            await queue.mine.vote(_user(), one.wanted.approval_id, "approve", "", granted)
        with pytest.raises(errors.NotFound):
            await queue.mine.approval(_user(), one.wanted.approval_id, granted)
    with pytest.raises(errors.NotFound):
        await queue.waits.approval(other.run_id, one.wanted.approval_id)
    assert await queue.mine.approvals(_user(), run_id=one.run_id, state="", after="", size=10) == []
    assert (await queue.mine.approval(one.owner, one.wanted.approval_id)).votes == ()


async def test_approvals_are_listed_newest_first_page_by_page(queue: queued.Queue) -> None:
    one = await asked(queue)
    wanted = [one.wanted.approval_id]
    for number in range(4):
        more = dataclasses.replace(one.wanted, approval_id=ids.uuid7(), step_key=f"{number + 2}:approve")
        await queue.waits.ask(more, _context(one.owner, one.thread, one.run_id))
        wanted.append(more.approval_id)
    await queue.mine.vote(one.owner, wanted[0], "approve", "")
    for user, granted in ((one.owner, ""), (_user(), one.thread)):
        seen, after = list[str](), ""
        while page := await queue.mine.approvals(user, run_id="", state="", after=after, size=2, granted=granted):
            seen += [found.approval_id for found in page]
            after = seen[-1]
        assert seen == wanted[::-1]
        pending = await queue.mine.approvals(user, run_id=one.run_id, state="pending", after="", size=10, granted=granted)
        assert [found.approval_id for found in pending] == wanted[:0:-1]


async def test_messages_are_numbered_in_their_order_and_leave_no_number_out(queue: queued.Queue) -> None:
    user, thread = _user(), ids.ThreadId.new()
    run_id = await queue.start(user, thread_id=thread)
    senders = [(user, ""), (_user(), thread), (_user(), thread)]

    async def sent(number: int) -> None:
        sender, granted = senders[number % 3]
        await queue.mine.send(sender, runs.Sent(run_id, f"m{number}", ids.uuid7(), f"Message {number}."), granted)

    async with asyncio.TaskGroup() as group:
        for number in range(30):
            group.create_task(sent(number))
    mail = await queue.waits.mail(run_id, 0)
    assert [one.number for one in mail] == list(range(1, 31))
    assert {one.content for one in mail} == {f"Message {number}." for number in range(30)}
    assert [one.number for one in await queue.waits.mail(run_id, 28)] == [29, 30]
    assert {one.user_id for one in mail} == {sender for sender, _ in senders}


async def test_messages_are_looked_at_some_at_a_time_and_a_run_takes_so_many(queue: queued.Queue) -> None:
    user = _user()
    run_id = await queue.start(user)
    many = (
        "INSERT INTO dispatcher.messages (run_id, number, message_id, user_id, owner_id, thread_id, request_id, content)"
        " SELECT run_id, number, gen_random_uuid(), user_id, user_id, thread_id, 'n' || number, 'x'"
        " FROM dispatcher.runs, generate_series(1, $2::int) AS number WHERE run_id = $1"
    )
    await queue.admin.execute(many, run_id, store_waits.MOST_MAIL - 1)
    found = await queue.waits.mail(run_id, 0)
    assert [one.number for one in found] == list(range(1, 65))
    assert [one.number for one in await queue.waits.mail(run_id, 900)] == list(range(901, 965))
    await queue.mine.require_mail_room(user, run_id)
    await queue.mine.send(user, runs.Sent(run_id, "last", ids.uuid7(), "Last."))
    await queue.admin.execute("UPDATE dispatcher.runs SET woken_at = NULL WHERE run_id = $1", run_id)
    with pytest.raises(errors.QuotaExceeded, match="1000 messages"):
        await queue.mine.require_mail_room(user, run_id)
    with pytest.raises(errors.QuotaExceeded):
        await queue.mine.send(user, runs.Sent(run_id, "one more", ids.uuid7(), "One more."))
    # what was not taken wakes nobody
    assert await queue.value(run_id, "woken_at") is None


@pytest.mark.parametrize(("waits_for", "wakes"), [("message", True), ("approval", False), ("timer", False)])
async def test_a_message_wakes_a_run_that_waits_for_one_and_no_other(queue: queued.Queue, waits_for: str, wakes: bool) -> None:
    user = _user()
    run_id = await queue.start(user)
    (claim,) = await queue.claim()
    # what there is of them counts when it waits for nothing else
    assert await queue.everyone.suspended(run_id, claim.epoch, waits_for, 600.0, mail_after=0 if waits_for == "message" else None)
    await queue.mine.send(user, runs.Sent(run_id, "m1", ids.uuid7(), "Hello."))
    assert len(await queue.claim()) == wakes
    # it is there for when it does
    assert [one.content for one in await queue.waits.mail(run_id, 0)] == ["Hello."]


async def test_arguments_with_a_nul_are_shown_to_those_who_decide(queue: queued.Queue) -> None:
    owner, thread = _user(), ids.ThreadId.new()
    run_id = await queue.start(owner, thread_id=thread)
    given = {"text": "a\0b", "literal": "\\u0000", "behind": "\\\0", "\0key": ["\0\0"]}
    wanted = approvals.Wanted(ids.uuid7(), run_id, "1:t", "Again?", 1, 600.0, "files.write", given)
    found = await queue.waits.ask(wanted, _context(owner, thread, run_id))
    assert found.parameters == {"text": "a\u2400b", "literal": "\\u0000", "behind": "\\\u2400", "\u2400key": ["\u2400\u2400"]}


async def test_the_same_message_comes_once_and_another_under_its_id_is_refused(queue: queued.Queue) -> None:
    user = _user()
    run_id = await queue.start(user)
    sent = runs.Sent(run_id, "m1", ids.uuid7(), "Once.")
    async with asyncio.TaskGroup() as group:
        for _ in range(4):
            group.create_task(queue.mine.send(user, sent))
    assert await queue.mine.mail_by_request(user, "m1") == sent
    assert len(await queue.waits.mail(run_id, 0)) == 1
    with pytest.raises(errors.AlreadyExists):
        await queue.mine.send(user, dataclasses.replace(sent, content="Twice."))
    # the id of another user's is another one
    other = await queue.start(other_user := _user())
    await queue.mine.send(other_user, runs.Sent(other, "m1", ids.uuid7(), "Mine."))


async def test_a_run_of_a_stranger_or_one_that_has_ended_takes_no_message(queue: queued.Queue) -> None:
    user, thread = _user(), ids.ThreadId.new()
    run_id = await queue.start(user, thread_id=thread)
    for sender, granted in ((_user(), ""), (_user(), ids.uuid7())):
        with pytest.raises(errors.FailedPrecondition):
            await queue.mine.send(sender, runs.Sent(run_id, "m1", ids.uuid7(), "Hello."), granted)
    (claim,) = await queue.claim()
    await queue.end(claim)
    with pytest.raises(errors.FailedPrecondition):
        await queue.mine.send(user, runs.Sent(run_id, "m1", ids.uuid7(), "Hello."))
    assert await queue.waits.mail(run_id, 0) == []


async def test_a_message_to_a_thread_goes_to_the_newest_run_that_waits_for_one(queue: queued.Queue) -> None:
    user, thread = _user(), ids.ThreadId.new()
    run_id = await queue.start(user, thread_id=thread, request_id="start")
    (claim,) = await queue.claim()
    assert await queue.mine.addressee(user, "r1", thread) is None
    assert await queue.everyone.suspended(run_id, claim.epoch, "message", 60.0)
    assert await queue.mine.addressee(user, "r1", thread) == run_id
    # another user's, another thread, and the request that has started it
    assert await queue.mine.addressee(_user(), "r1", thread) is None
    assert await queue.mine.addressee(user, "r1", ids.uuid7()) is None
    assert await queue.mine.addressee(user, "start", thread) is None
    await queue.mine.send(user, runs.Sent(run_id, "r1", ids.uuid7(), "Go on."))
    (claim,) = await queue.claim()
    await queue.end(claim)
    # the same again goes where it went
    assert await queue.mine.addressee(user, "r1", thread) == run_id
    assert await queue.mine.addressee(user, "r2", thread) is None
