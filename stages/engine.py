"""The only door to vLLM: a child process that holds the engine, and this side of the socket to it.

Each question and each answer is a line of JSON. The process ends with its parent, whatever ends that, and what it
prints goes to a log. `serve` is what it runs; `rollout.VLLMSampler` decides when to start one and when to give up.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from align_pipeline.pipeline.errors import AlignError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm import LLM


class Lost(Exception):
    """The engine died, hung or answered with NaNs; a new one may do better."""


class Engine:
    """One child process, the socket to it, and what it was told last."""

    def __init__(self, log: Path | None) -> None:
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        self.log: IO[bytes] = tempfile.TemporaryFile("a+b") if log is None else log.open("a+b")  # noqa: SIM115
        self.log_start = os.fstat(self.log.fileno()).st_size
        self.channel, theirs = socket.socketpair()
        with theirs:
            descriptor = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-c", f"from {__name__} import serve; serve({descriptor})"],
                stdin=subprocess.PIPE,  # says nothing; its end is ours
                stdout=self.log,
                stderr=self.log,
                env=_environment(),
                pass_fds=(descriptor,),
                start_new_session=True,
            )
        self.unread = b""
        self.lora: tuple[str, int, str] | None = None
        """Name, id and folder of the adapter that it holds."""
        self.loads = 0
        self.kill = weakref.finalize(self, _end, self.process, self.channel, self.log)
        """End the process; called by itself when nobody holds this object, and when the interpreter exits."""

    def ask(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return the answer; raise Lost when the process ends or is silent for so long."""
        try:
            self.channel.settimeout(seconds)
            self.channel.sendall(json.dumps(message).encode() + b"\n")
            while True:
                while b"\n" not in self.unread:
                    self.unread += self._receive(seconds)
                line, _, self.unread = self.unread.partition(b"\n")
                answer: dict[str, Any] = json.loads(line)
                if "working" not in answer:
                    return answer
        except OSError as error:
            raise Lost(self._why(f"the socket to it failed ({error})")) from error

    def swap(self, version: int, folder: Path, seconds: float) -> tuple[str, int, str]:
        """Have an adapter loaded and the one before removed; return its name, id and folder.

        vLLM knows an adapter by its id, and its cache of keys and values by name and folder: each load gets new ones.
        """
        path = str(folder.absolute())
        if self.lora is not None and self.lora[2] == path:
            return self.lora
        self.loads += 1
        lora = (f"version-{version}-load-{self.loads}", self.loads, path)
        answer = self.ask({"do": "swap", "lora": lora, "old": self.lora and self.lora[1]}, seconds)
        if "error" in answer:
            raise AlignError(
                f"{folder}: vLLM refused the adapter: {answer['error']}; train it on the base that the engine holds, "
                "or set sampler: transformers"
            )
        self.lora = lora
        return lora

    def last_lines(self, count: int = 12) -> list[str]:
        """Return the end of what this process printed."""
        size = os.fstat(self.log.fileno()).st_size
        start = max(self.log_start, size - 16_384)
        text = os.pread(self.log.fileno(), size - start, start).decode("utf-8", "replace")
        return [line.rstrip() for line in text.splitlines() if line.strip()][-count:]

    def _receive(self, seconds: float) -> bytes:
        """Return the next bytes, at most so many seconds from now."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            self.channel.settimeout(min(left, 1.0))
            try:
                if part := self.channel.recv(2**20):
                    return part
                raise Lost(self._why("it closed its socket"))
            except TimeoutError:
                if self.process.poll() is not None:  # a process that it left behind may hold the socket open
                    raise Lost(self._why("it ended")) from None
        raise Lost(f"the engine was silent for {seconds:g} s")

    def _why(self, otherwise: str) -> str:
        """Return how the process ended, if it did."""
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(1.0)
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
            return f"the engine {how}"
        return f"the engine is lost: {otherwise}"


def _end(process: subprocess.Popen[bytes], channel: socket.socket, log: IO[bytes]) -> None:
    """Kill an engine with all that it started; it holds nothing that is worth a goodbye."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    for end in (process.stdin, channel, log):
        if end is not None:
            end.close()


def _environment() -> dict[str, str]:
    """Return an engine's environment: on its rank's own GPU, and without what makes it part of the trainer's group."""
    group = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"}
    environment = {name: value for name, value in os.environ.items() if name not in group}
    if rank := os.environ.get("LOCAL_RANK"):
        gpus = environment.get("CUDA_VISIBLE_DEVICES", rank).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = gpus[int(rank)] if int(rank) < len(gpus) else gpus[0]
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    return environment | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


# --- the other side of the socket -------------------------------------------------------------------------------------


def serve(descriptor: int) -> None:
    """Be the engine: answer each line of a socket with a line, until its other end closes.

    What goes wrong while it samples is not caught: the engine's state is lost with it, and the parent starts another.
    """
    _die_with_parent()
    os.set_inheritable(descriptor, False)
    with socket.socket(fileno=descriptor) as channel, channel.makefile("rb") as lines:

        def say(message: Mapping[str, Any]) -> None:
            channel.sendall(json.dumps(message).encode() + b"\n")

        try:
            engine = _load(**json.loads(lines.readline())["start"])
        except Exception as error:
            traceback.print_exc()  # before the parent reads the log
            say({"error": f"{type(error).__name__}: {error}"})
            return
        say({"ready": True})
        for line in lines:
            message = json.loads(line)
            say(_swap(engine, **message) if message["do"] == "swap" else {"answers": _draw(engine, message, say)})


def _die_with_parent() -> None:
    """End this process group as soon as the parent does: by the kernel, and by the pipe that only the parent holds."""
    import ctypes
    import threading

    if sys.platform == "linux":  # when the thread that started it ends, to be exact
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)

    def watch() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def _load(*, max_lora_rank: int | None, **arguments: Any) -> LLM:
    """Return an engine that has drawn one token: some models start, and fail at their first."""
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    if max_lora_rank is not None:
        # Two: the old adapter stays until the new one is known to be good.
        arguments |= {"enable_lora": True, "max_lora_rank": max_lora_rank, "max_loras": 2}
    engine = LLM(
        **arguments,
        distributed_executor_backend="uni",
        enforce_eager=current_platform.is_cpu(),
        generation_config="vllm",  # the model's own would change temperature, top_p and top_k
        logprobs_mode="processed_logprobs",
        skip_tokenizer_init=True,
    )
    engine.generate([{"prompt_token_ids": [0]}], SamplingParams(max_tokens=1, detokenize=False), use_tqdm=False)
    return engine


def _swap(engine: LLM, *, lora: Sequence[Any], old: int | None, **_: Any) -> dict[str, Any]:
    """Add an adapter, see that it is there, and remove the one before.

    Never by `generate`: there, an adapter that cannot be read ends the engine.
    """
    from vllm.lora.request import LoRARequest

    request = LoRARequest(*lora)
    try:
        added = engine.llm_engine.add_lora(request)
        if not added or request.lora_int_id not in engine.llm_engine.list_loras():
            raise RuntimeError(f"add_lora returned {added} and the engine does not list it")
    except Exception as error:
        with suppress(Exception):
            engine.llm_engine.remove_lora(request.lora_int_id)
        return {"error": f"{type(error).__name__}: {error}"}
    if old is not None:
        engine.llm_engine.remove_lora(old)
    return {"loras": sorted(engine.llm_engine.list_loras())}


def _draw(engine: LLM, message: Mapping[str, Any], say: Callable[[Mapping[str, Any]], None]) -> list[Any]:
    """Return ids, log-probs and finish of each answer; say once a second that it is still at work."""
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    asked: list[Any] = [{"prompt_token_ids": ids} for ids in message["prompts"] for _ in range(message["n"])]
    how = [
        SamplingParams(
            temperature=message["temperature"],
            top_p=1.0,
            top_k=0,
            seed=seed,
            max_tokens=message["max_new_tokens"],
            stop_token_ids=message["stop_ids"],
            ignore_eos=True,  # the stop ids say all
            logprobs=0,  # of the chosen token alone
            detokenize=False,
        )
        for seed in message["seeds"]
    ]
    lora = None if message["lora"] is None else LoRARequest(*message["lora"])
    engine.enqueue(asked, how, lora_request=lora, use_tqdm=False)
    done: dict[int, Any] = {}  # by the number of the request, which vLLM counts up
    said = time.monotonic()
    while engine.llm_engine.has_unfinished_requests():
        for output in engine.llm_engine.step():
            if output.finished:
                (drawn,) = output.outputs
                assert drawn.finish_reason in ("stop", "length"), drawn.finish_reason
                logprobs = [step[id_].logprob for id_, step in zip(drawn.token_ids, drawn.logprobs, strict=True)]
                done[int(output.request_id)] = list(drawn.token_ids), logprobs, drawn.finish_reason
        if time.monotonic() - said > 1:
            say({"working": True})
            said = time.monotonic()
    assert len(done) == len(asked), "the engine forgot a prompt"
    return [done[number] for number in sorted(done)]
