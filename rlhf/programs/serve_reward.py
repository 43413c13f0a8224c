"""``rlhf serve-reward``: a reward model behind HTTP, for runs on other machines or in other processes."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rlhf.errors import ExitCode, UserError
from rlhf.recipe.servers import is_loopback, token_of

if TYPE_CHECKING:
    from rlhf.programs.reward_service import Service

KEEP_ALIVE_SECONDS = 120  # connections stay open while a run decodes between two scorings


@dataclass(frozen=True, kw_only=True)
class Options:
    """The command's options. batch_tokens: rows × padded width of one forward. token_env: names a variable; None = no
    token. max_waiting: requests."""

    host: str = "127.0.0.1"
    port: int = 8100
    token_env: str | None = None
    batch_tokens: int = 16384
    dtype: str = "auto"
    deterministic: bool = True
    max_texts: int = 1024
    max_body_mib: int = 16
    max_waiting: int = 64


def main(model: str, options: Options) -> ExitCode:
    """Serves until SIGTERM or SIGINT; requests that were accepted are answered first.

    Everything that can be wrong with the options is said before the model loads. Raises UserError.
    """
    _needs_the_extra()
    token = _token(options)
    with _bound(options.host, options.port) as listener:
        _serve(_service(model, options, token), listener)
    return ExitCode.DONE


def _service(given: str, options: Options, token: str | None) -> Service:
    """The loaded model behind its queue."""
    import torch

    from rlhf.models.load import quiet_libraries
    from rlhf.programs.evaluate import find_target
    from rlhf.programs.reward_queue import Scorer
    from rlhf.programs.reward_service import Service
    from rlhf.rewards.contract import contract_of
    from rlhf.rewards.model import load_reward_model
    from rlhf.runtime.distributed import auto_dtype

    target, batch_tokens = find_target(given), options.batch_tokens
    quiet_libraries()
    model = load_reward_model(
        target.model,
        device="cuda" if torch.cuda.is_available() else "cpu",
        compute_dtype=auto_dtype(options.dtype),
        microbatch_tokens=batch_tokens,
    )
    contract = contract_of(
        model,
        deterministic=options.deterministic,
        max_texts=options.max_texts,
        max_body_bytes=options.max_body_mib * 2**20,
        version=_version(),
    )
    merge, waiting = not options.deterministic, options.max_waiting
    scorer = Scorer(model, merge=merge, budget_tokens=batch_tokens, waiting=waiting)
    return Service(scorer, contract, token, model.tokenizer.bos_token)


def _serve(service: Service, listener: socket.socket) -> None:
    import uvicorn

    from rlhf.programs.reward_service import application

    server = uvicorn.Server(
        uvicorn.Config(
            application(service),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
        )
    )
    address, port = listener.getsockname()[:2]
    where = f"[{address}]" if ":" in address else address
    with _ending_in_order(server):
        contract = service.contract
        print(f"{contract.name} ({contract.dtype}) is served at http://{where}:{port}", flush=True)
        server.run(sockets=[listener])
    service.scorer.close()


@contextmanager
def _ending_in_order(server: Any) -> Iterator[None]:
    """A signal ends the server, also one that comes before the server listens to any. Once it has ended it raises the
    signal again, for whoever listened before; here nobody dies of it."""

    def end(number: int, frame: Any) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _needs_the_extra() -> None:
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise UserError(
            f"serve-reward needs {' and '.join(missing)}, which the toolkit alone does not install; "
            "pip install 'rlhf[serve]'"
        )


def _token(options: Options) -> str | None:
    """The bearer token. Raises UserError where it is named and not there, or where strangers could ask without one."""
    if options.token_env is None:
        if not is_loopback(options.host):
            raise UserError(
                f"--host {options.host} lets other machines ask, and there is no token: whoever reaches the port could "
                "use the model; put a secret into a variable and name it with --token-env, or keep --host 127.0.0.1"
            )
        return None
    try:
        return token_of(options.token_env)
    except UserError as error:
        raise UserError(f"--token-env: {error}") from error


def _bound(host: str, port: int) -> socket.socket:
    """The port, taken before the model loads: who asks meanwhile waits. Raises UserError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host {host} --port {port} cannot be had ({error.strerror}); name another one") from error


def _version() -> str:
    try:
        return version("rlhf")
    except PackageNotFoundError:  # a source tree on the path
        return "unknown"
