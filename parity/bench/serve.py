"""A server under load: throughput by number of clients, the second turn of a chat, two minutes of a crowd.

``python -m parity bench serve`` starts ``tinyllm serve`` in a process of its own and is its clients. Nothing
is compared with another program: batching is compared with one client, a second turn with a first.
"""

import http.client
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from parity import tables
from parity.bench.isa import held_to
from parity.bench.process import describe, machine, python_path, with_threads

PAYS = 2.5  # times the tokens/s of one client that 8 clients must get
GROWTH = 0.05  # of memory, from a third of the time with a crowd to its end
TURN = 0.5  # of the time to the first token of a first turn that the second may take


@dataclass(frozen=True)
class Sizes:
    """Numbers of clients, requests, tokens and seconds."""

    clients: tuple[int, ...] = (1, 4, 8, 16)
    steady: float = 20.0  # seconds in which every client asks one request after another
    prompt: int = 32  # tokens; client i has i more, so that rows have different lengths
    new: int = 128  # tokens of an answer, at most
    crowd: int = 32  # clients at once
    seconds: float = 120.0  # that the crowd stays
    slots: int = 8  # for the crowd
    queue: int = 16  # shorter than the crowd, so that some are refused
    context: int = 512  # of the crowd's conversations
    history: int = 300  # words of a chat's first turn
    turns: int = 3  # chats whose two turns are timed


# ---- The server ----


@contextmanager
def running(model: str, threads: int, **options):
    """A server in a process of its own: its process and its port."""
    command = [sys.executable, "-P", "-m", "tinyllm", "serve", "--model", model, "--port", "0"]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    environment = held_to("native", with_threads(threads)) | python_path()
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    with subprocess.Popen(command, env=environment, **pipes) as server:
        try:
            found = re.search(r":(\d+)/v1", server.stdout.readline())
            if found is None:
                raise RuntimeError(f"the server did not start: {' '.join(command)}")
            yield server, int(found[1])
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(60)


def memory_of(process: int) -> int:
    """Bytes that a process has in memory, 0 where that is not known."""
    try:
        pages = Path(f"/proc/{process}/statm").read_text().split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


# ---- A client ----


@dataclass
class Reply:
    """What a client got for one request."""

    status: int = 0
    tokens: int = 0
    first: float = 0.0  # seconds to the first text
    text: str = ""
    times: list[float] = field(default_factory=list)  # of time.perf_counter(), at each event
    problem: str | None = None  # why the reply is not whole


def ask(port: int, path: str, body: dict) -> Reply:
    """Send a request for a stream and read all of it."""
    reply, start = Reply(), time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    try:
        connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        reply.status, events = response.status, []
        if response.status != 200:
            response.read()
            return reply
        for line in response:
            if line.startswith(b"data: "):
                events.append(line[6:].strip())
                reply.times.append(time.perf_counter())
                reply.first = reply.first or _has_text(events[-1]) * (time.perf_counter() - start)
        reply.problem = _read(events, reply)
    except (OSError, http.client.HTTPException, ValueError) as error:
        reply.problem = repr(error)
    finally:
        connection.close()
    return reply


def _has_text(event: bytes) -> bool:
    return event != b"[DONE]" and any(_text(choice) for choice in json.loads(event).get("choices", ()))


def _text(choice: dict) -> str:
    return choice.get("text") or choice.get("delta", {}).get("content") or ""


def _read(events: list[bytes], reply: Reply) -> str | None:
    """Add the text and the tokens of a stream to a reply; return what is wrong with the stream."""
    if not events or events[-1] != b"[DONE]":
        return "the stream has no end"
    chunks = [json.loads(event) for event in events[:-1]]
    choices = [choice for chunk in chunks for choice in chunk.get("choices", ())]
    reply.text = "".join(map(_text, choices))
    reasons = [choice["finish_reason"] for choice in choices]
    if not reasons or reasons[-1] is None or any(reasons[:-1]):
        return "the stream has no reason, or not at its end"
    reply.tokens = chunks[-1]["usage"]["completion_tokens"]
    return None if reply.tokens else "the stream has no tokens"


def at_once(count: int, client) -> None:
    """Run ``client(number)`` in ``count`` threads."""
    threads = [threading.Thread(target=client, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# ---- Measurements ----


def throughput(port: int, count: int, sizes: Sizes) -> float:
    """Tokens per second of ``count`` clients in total, prefill included, while all of them are there.

    Answers end where the model ends them, so that clients with a fixed number of requests would not.
    """
    replies, start = [], time.perf_counter()
    end = start + sizes.steady

    def client(number: int) -> None:
        for turn in itertools.takewhile(lambda turn: time.perf_counter() < end, itertools.count()):
            seed = 1000 * count + 100 * turn + number
            ids = [3 + (seed + 7 * i) % 50 for i in range(sizes.prompt + number)]
            body = dict(prompt=ids, max_tokens=sizes.new, temperature=0.8, top_k=40, seed=seed)
            replies.append(ask(port, "/v1/completions", body))

    at_once(count, client)
    _check(replies)
    shares = (sum(at < end for at in reply.times) / len(reply.times) for reply in replies)
    return sum(reply.tokens * share for reply, share in zip(replies, shares)) / sizes.steady


def two_turns(port: int, number: int, sizes: Sizes) -> tuple[float, float]:
    """Seconds to the first token of a chat's first and second answer."""
    words = " ".join(f"item {number}-{i}," for i in range(sizes.history // 2))
    messages = [{"role": "user", "content": f"Here is a list: {words} that is all. Say OK."}]
    options = dict(temperature=0, max_tokens=16)
    first = ask(port, "/v1/chat/completions", dict(messages=messages, **options))
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "What is in it?"}]
    second = ask(port, "/v1/chat/completions", dict(messages=messages, **options))
    _check([first, second])
    return first.first, second.first


@dataclass
class Crowd:
    """What happened while many clients asked at once."""

    seconds: float
    statuses: Counter = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    tokens: int = 0
    firsts: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # bytes, regularly


def crowd(port: int, process: int, sizes: Sizes) -> Crowd:
    """``sizes.crowd`` clients that chat for ``sizes.seconds``, each with several turns."""
    found, lock = Crowd(sizes.seconds), threading.Lock()
    end = time.monotonic() + sizes.seconds

    def client(number: int) -> None:
        turn, messages = 0, []
        while time.monotonic() < end:
            turn += 1
            messages = [] if turn % 3 == 1 else messages  # a new conversation
            asked = [
                *messages,
                {"role": "user", "content": f"Tell me {turn} things about the number {number}."},
            ]
            body = dict(messages=asked, max_tokens=16 + 8 * (number % 5), seed=100 * number + turn)
            reply = ask(port, "/v1/chat/completions", body)
            with lock:
                found.statuses[reply.status] += 1
                found.tokens += reply.tokens
                found.problems += [reply.problem] if reply.problem else []
                found.firsts += [reply.first] if reply.first else []
            if reply.status == 200:
                messages = [*asked, {"role": "assistant", "content": reply.text}]
            else:
                time.sleep(1)

    def watch() -> None:
        while time.monotonic() < end:
            found.memory.append(memory_of(process))
            time.sleep(min(1, sizes.seconds / 20))

    watcher = threading.Thread(target=watch)
    watcher.start()
    at_once(sizes.crowd, client)
    watcher.join()
    return found


def _check(replies: list[Reply]) -> None:
    wrong = [
        reply.problem or f"status {reply.status}" for reply in replies if reply.problem or reply.status != 200
    ]
    if wrong:
        raise RuntimeError(f"{len(wrong)} of {len(replies)} requests failed: {wrong[0]}")


def serve(model: str, threads: int, sizes: Sizes) -> dict:
    """Measure everything; return the result for JSON."""
    before, rates, turns = machine(), {}, []
    with running(model, threads, slots=max(sizes.clients)) as (_, port):
        throughput(port, 1, sizes)  # not counted: memory is touched for the first time
        for count in sizes.clients:
            rates[count] = throughput(port, count, sizes)
            print(f"{count} clients: {rates[count]:.1f} tokens/s", file=sys.stderr, flush=True)
        for number in range(sizes.turns):
            turns.append(two_turns(port, number, sizes))
    options = dict(slots=sizes.slots, queue=sizes.queue, context=sizes.context)
    with running(model, threads, **options) as (server, port):
        found = crowd(port, server.pid, sizes)
    first, second = (median(times) for times in zip(*turns))
    return {
        "model": model,
        "threads": threads,
        "machine": before,
        "tokens per second": rates,
        "first turn": first,
        "second turn": second,
        "crowd": vars(found) | {"clients": sizes.crowd, "slots": sizes.slots, "queue": sizes.queue},
    }


# ---- The report ----


def thirds_of(memory: list[int]) -> tuple[int, int]:
    """The largest value of the first third and that of the last."""
    third = max(1, len(memory) // 3)
    return max(memory[:third], default=0), max(memory[-third:], default=0)


def growth_of(memory: list[int]) -> float:
    """Relative growth from the first of ``thirds_of`` to the second."""
    before, after = thirds_of(memory)
    return after / before - 1 if before else 0.0


def not_met(result: dict) -> list[str]:
    """The targets that are not met, in words."""
    rates, crowd = result["tokens per second"], result["crowd"]
    statuses = {status: number for status, number in crowd["statuses"].items() if status not in (200, 503)}
    problems = []
    if {1, 8} <= rates.keys() and rates[8] < PAYS * rates[1]:
        problems.append(f"8 clients get {rates[8] / rates[1]:.2f} times the tokens/s of one (target {PAYS})")
    if result["second turn"] > TURN * result["first turn"]:
        problems.append(f"a second turn takes {result['second turn'] / result['first turn']:.2f} of a first")
    if statuses or crowd["problems"]:
        problems.append(f"statuses {statuses}, {len(crowd['problems'])} streams that are not whole")
    if growth_of(crowd["memory"]) > GROWTH:
        problems.append(f"memory grew by {growth_of(crowd['memory']):.1%}")
    return problems


def markdown(result: dict) -> str:
    """The tables: throughput, two turns of a chat, and the crowd."""
    rates, crowd, facts = result["tokens per second"], result["crowd"], result["machine"]
    one = next(iter(rates.values()))
    sentence = tables.measured(
        "bench serve", f"{result['model']}, {facts['cpu']} ({facts['instructions']})",
        f"{result['threads']} threads, load {facts['load']} before",
    )  # fmt: skip
    lines = [sentence, "", tables.markdown(
        ["clients", "tokens/s in total", "times one client's"],
        ([str(count), f"{rate:.1f}", f"{rate / one:.2f}"] for count, rate in rates.items()),
    ), ""]  # fmt: skip
    (before, after), firsts = thirds_of(crowd["memory"]), crowd["firsts"] or [0.0]
    refused = crowd["statuses"].get(503, 0)
    rows = [
        ["time to the first token of a first turn, and of a second", f"{result['first turn']:.2f} s, "
         f"{result['second turn']:.2f} s ({result['second turn'] / result['first turn']:.2f})"],
        [f"{crowd['clients']} clients for {crowd['seconds']:g} s, {crowd['slots']} slots, a queue of "
         f"{crowd['queue']}", f"{crowd['tokens'] / crowd['seconds']:.1f} tokens/s"],
        ["whole streams, streams that are not, refused with 503",
         f"{crowd['statuses'].get(200, 0)}, {len(crowd['problems'])}, {refused}"],
        ["median and longest time to the first token", f"{median(firsts):.1f} s, {max(firsts):.1f} s"],
        ["memory of the server: first third, last third",
         f"{before / 1e6:.0f} MB, {after / 1e6:.0f} MB ({growth_of(crowd['memory']):+.1%})"],
    ]  # fmt: skip
    lines += [tables.markdown(["", ""], rows), ""]
    missed = not_met(result)
    lines.append(f"Not met: {'; '.join(missed)}." if missed else "All targets are met.")
    return "\n".join(lines)


def report(result: dict) -> str:
    """The text that the command prints."""
    return f"{describe(result['machine'])}\n\n{markdown(result)}"
