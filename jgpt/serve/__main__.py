"""Serve a model: a chat page for the browser, and an endpoint that OpenAI's clients can use.

    python -m jgpt.serve --model runs/mine
    python -m jgpt.serve --model HuggingFaceTB/SmolLM2-135M-Instruct --port 8001
    JGPT_SERVE_TOKEN=... python -m jgpt.serve --model runs/mine --host 0.0.0.0

Open the address that it prints. Programs use ADDRESS/v1 (/v1/models, /v1/completions, /v1/chat/completions). What is
asked at the same time is written at the same time. Only this machine can reach it; another --host needs a token, in the
environment variable JGPT_SERVE_TOKEN. Ctrl-C stops it. It needs: pip install 'jgpt[serve]'.

After training, in the data path: a model in, conversations out.
"""

import ipaddress
import os
import socket

from absl import flags

from jgpt.cli import model_flags
from jgpt.cli.run import run
from jgpt.config.defaults import MOST_TOKENS
from jgpt.errors import UserError

TOKEN, SHORTEST_TOKEN = "JGPT_SERVE_TOKEN", 8


def define_flags() -> None:
    """Define the flags."""
    model_flags.define_model()
    flags.DEFINE_string("name", "", "what clients call the model; without it the last part of --model, or the Hub name")
    flags.DEFINE_string("host", "127.0.0.1", f"the address to listen on; another one than this machine's needs {TOKEN}")
    flags.DEFINE_integer("port", 8000, "the port to listen on; 0: any that is free", lower_bound=0, upper_bound=65535)
    flags.DEFINE_string("chat_template", None, "a file with a Jinja template, instead of the model's own")
    flags.DEFINE_integer("rows", 8, "texts that are written at the same time, at most", lower_bound=1, upper_bound=256)
    flags.DEFINE_integer("queue", 32, "texts that wait for their turn, at most; more are refused (429)", lower_bound=0)
    flags.DEFINE_integer("max_new_tokens", 4096, "tokens of an answer, at most", 1, MOST_TOKENS)
    flags.DEFINE_integer(
        "context_length", 4096, "tokens of question, history and answer together; 0: the model's own", lower_bound=0
    )
    model_flags.define_device()


def main() -> None:
    """Load the model, answer until Ctrl-C."""
    args, name = flags.FLAGS, model_flags.model_name()
    token = os.environ.get(TOKEN, "")
    check_address(args.host, token)
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"the package {error.name} is missing. Needed: starlette and uvicorn. Install them: pip install"
            " 'jgpt[serve]', or in a checkout: pip install -e '.[serve]'"
        ) from None
    with listen(args.host, args.port) as listener:  # before the model is loaded, which takes a while
        serve(name, listener, token)


def serve(name: str, listener: socket.socket, token: str) -> None:
    """Load the model, and answer what comes to `listener` until the server is interrupted."""
    # Here, as all that loads JAX: --help must not wait for it.
    import uvicorn

    from jgpt.api import load
    from jgpt.cli.terminal import say
    from jgpt.hardware.devices import chip_of, local_devices
    from jgpt.serve.app import make_app
    from jgpt.serve.start import make_endpoints

    args = flags.FLAGS
    model = load(
        name,
        **model_flags.loading(),
        context_length=args.context_length,
        rows=args.rows,
        chat_template=args.chat_template or "",
    )
    device = chip_of(local_devices()[0]).name
    say(f"{name} on {device} in {model.loaded.model.dtype.__name__}: compiling")
    endpoints = make_endpoints(
        model,
        name=args.name or served_name(name),
        rows=args.rows,
        queue=args.queue,
        max_new_tokens=args.max_new_tokens,
        context_length=args.context_length,
    )
    shown = f"[{args.host}]" if ":" in args.host else args.host
    address = f"http://{shown}:{listener.getsockname()[1]}"
    say(
        f"{'chat' if endpoints.prompts else 'page'}: {address}/\n"
        f"API:  {address}/v1, model {endpoints.name!r}, up to {args.rows} texts at a time\nCtrl-C stops it."
    )
    settings = uvicorn.Config(
        make_app(endpoints, token, args.host.lower()),
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=args.rows + args.queue + 200,
        timeout_graceful_shutdown=3,
    )
    try:
        uvicorn.Server(settings).run(sockets=[listener])
    except KeyboardInterrupt:  # the server has stopped, and passes on the signal that it got
        say("stopped")


def served_name(name: str) -> str:
    """Return what clients call a model: no path of this machine.

    >>> served_name("runs/mine/"), served_name("OWNER/NAME")
    ('mine', 'OWNER/NAME')
    """
    from jgpt.config.files import user_path

    path = user_path(name)
    is_path = path.is_dir() or path.is_absolute() or name.count("/") != 1 or name.endswith("/")
    return path.absolute().name if is_path else name


def check_address(host: str, token: str) -> None:
    """Raise UserError for an address that others can reach, without a token that keeps them out."""
    if token and len(token) < SHORTEST_TOKEN:
        raise UserError(f"{TOKEN} has {len(token)} characters. Allowed: {SHORTEST_TOKEN} and more. Take a longer one.")
    try:
        is_own = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_own = False
    if not (is_own or token):
        raise UserError(
            f"--host={host} lets other machines in. Needed: a token, which their requests must have. Set the"
            f" environment variable {TOKEN}, for example to the output of: openssl rand -hex 16. Or leave --host"
            " out: then only this machine can reach it."
        )


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; raise UserError where the address cannot be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"--host={host} --port={port}: {error.strerror or error}. Allowed: an address of this machine and a free"
            " port. Take another one, or --port=0 for any."
        ) from None


if __name__ == "__main__":
    define_flags()
    run(main, __doc__)
