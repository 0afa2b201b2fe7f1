"""Talking to the Hub: what is worth another try, how long to wait, and what to say when it stays away."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from ..console import get_logger
from ..errors import InputError


logger = get_logger(__name__)

Result = TypeVar("Result")

# Seconds before the second, third, ... try. The client library repeats single uploads by itself besides.
WAITS = (1.0, 2.0, 4.0, 8.0)
# No further try after so many seconds; a Hub that asks for a longer wait (`Retry-After`) is not waited for either.
PATIENCE = 300.0
# A connection that says nothing for so long counts as cut; the client library would wait for ever.
SILENCE = 120.0


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def _response_of(error: BaseException) -> Any:
    return next((one.response for one in _chain(error) if getattr(one, "response", None) is not None), None)


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error or behind what caused it; None if there was no answer."""
    response = _response_of(error)
    return None if response is None else int(response.status_code)


def is_transport_error(error: BaseException) -> bool:
    """Whether no (whole) answer came: refused, reset, timed out, cut."""
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    for one in _chain(error):
        if isinstance(one, OfflineModeIsEnabled):
            return False
        # httpx or httpx2, whichever the client library is built on.
        names = {kind.__name__ for kind in type(one).__mro__ if kind.__module__.startswith("httpx")}
        if "TransportError" in names or isinstance(one, (ConnectionError, TimeoutError, LocalEntryNotFoundError)):
            return True
    return False


def is_worth_another_try(error: BaseException) -> bool:
    """True for what passes by itself: too many requests, a conflict, a failing or unreachable Hub.

    Never in offline mode, where no answer will come.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    status = status_of(error)
    if status is None:
        return is_transport_error(error)
    return status in (408, 409, 412, 429) or status >= 500


def _asked_wait(error: BaseException) -> float:
    response = _response_of(error)
    value = "" if response is None else response.headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0


def attempt(action: Callable[[], Result], what: str) -> Result:
    """The result of `action`, which is tried again where that can help: see [`is_worth_another_try`].

    Args:
        action: Talks to the Hub; may be called several times.
        what: For the log, for example `"pushing outputs/student"`.

    Raises:
        Exception: The last error of `action`.
    """
    from huggingface_hub import get_session

    start = time.monotonic()
    for wait in (*WAITS, None):
        get_session().timeout = SILENCE
        try:
            return action()
        except Exception as error:
            if wait is None or not is_worth_another_try(error):
                raise
            seconds = max(wait, _asked_wait(error))
            if time.monotonic() - start + seconds > PATIENCE:
                raise
            logger.info("%s: %s; trying again in %g s.", what, explain(error), seconds)
        time.sleep(seconds)
    raise AssertionError("the last try returns or raises")


def explain(error: BaseException) -> str:
    """What an error of the client library means, in a few words and without any token."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError

    status = status_of(error)
    message = _first_line(error)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE=1 forbids to ask the Hub"
    if isinstance(error, GatedRepoError):
        return "access to the repository is restricted, and this account has none"
    if status == 401 and get_token() is None:
        return "nobody is logged in (401)"
    if status == 401 and "Invalid credentials" in str(error):
        return "the Hub does not know the token (401)"
    if isinstance(error, RepositoryNotFoundError):
        return f"the repository does not exist, or this account may not see it ({status})"
    if status is None and is_transport_error(error):
        return f"the Hub cannot be reached ({message})"
    meanings = {
        401: "the Hub does not accept the login (401)",
        403: "this account may not write there (403)",
        404: "the repository or the revision is gone (404)",
        409: "another change is in progress there (409)",
        412: "somebody else changes the repository at the same time (412)",
        429: "the Hub takes no more requests for now (429)",
    }
    if status in meanings:
        text = meanings[status]
    elif status == 400:
        text = str(error).strip().split("\n")[0].rstrip(".")  # the client library says what is wrong with the files
    elif status is not None and status >= 500:
        text = f"the Hub failed ({status})"
    else:
        text = message
    token = get_token()
    return text.replace(token, "<hidden>") if token else text


def _first_line(error: BaseException) -> str:
    *_, root = _chain(error)
    lines = [line.strip() for line in str(root).splitlines() if line.strip()]
    return lines[0] if lines else type(root).__name__


def split_revision(name: str) -> tuple[str, str | None]:
    """`"user/name@revision"` as id and revision; without `@` the revision is None."""
    repo, _, revision = name.partition("@")
    return repo, revision or None


def check_repo_id(repo_id: str, where: str) -> None:
    """Raises [`InputError`] for what can be no id of a repository."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        raise InputError(f"{repo_id!r} is no id of a repository", where=where, cure="Write it as you/name") from None


def with_namespace(repo_id: str, token: str | None) -> str:
    """The id with its owner: a bare name belongs to whoever is logged in."""
    if "/" in repo_id:
        return repo_id
    from huggingface_hub import HfApi

    name: Any = attempt(lambda: HfApi(token=token).whoami()["name"], "asking the Hub who is logged in")
    return f"{name}/{repo_id}"
