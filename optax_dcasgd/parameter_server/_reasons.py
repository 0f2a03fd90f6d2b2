"""What Ray says of the end of an actor, in one line."""

import re

import ray


class StartError(Exception):
    """An actor could not be made; the message is one line."""


_LONGEST = 500  # characters; what pip prints can be kilobytes
_START_ERROR = f"{StartError.__name__}: "


def one_line(error: BaseException) -> str:
    """What went wrong, and no more than that of the pages that Ray writes about it."""
    text = str(error).strip()
    if not isinstance(error, ray.exceptions.RayError):
        return f"{type(error).__name__}: {' '.join(text.split())}"
    if _START_ERROR in text:
        return text.rpartition(_START_ERROR)[2].strip()
    if (
        isinstance(error, ray.exceptions.RayTaskError)
        or getattr(error, "actor_init_failed", False)
        or "Traceback (most recent call last)" in text
    ):
        return text.splitlines()[-1].strip()
    if isinstance(error, ray.exceptions.RuntimeEnvSetupError):
        text = " ".join(text.split())[:_LONGEST]
    line = text.partition("\n")[0]
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        detail = re.search("RPC error: (.*?) rpc_code", line)
        line = f"it died or cannot be reached{f' ({detail[1]})' if detail else ''}"
    if detail := re.search("exit detail: ([^\n]*)|The actor is dead because ([^\n]*)", text):
        line = detail[1] or detail[2]
        if "End of file" in line:
            line = "it was killed (for want of memory, say) or crashed"
        if pid := re.search(r"pid: (\d+)", text):
            line = f"process {pid[1]}: {line}"
    return f"{type(error).__name__}: {line}"
