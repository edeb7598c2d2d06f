"""The command `ouro`: generate, chat, inspect, quantize, report, info, bench."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args

import ouro
from ouro import _core
from ouro.bench import command as bench_command
from ouro.engine import Engine
from ouro.errors import OuroError
from ouro.exits import NamedExit
from ouro.extras import did_you_mean
from ouro.files import check_output
from ouro.generation import KV_POLICIES, GenerationStats
from ouro.hub import resolve
from ouro.loading import CHOICES, Compute
from ouro.model import Model
from ouro.packed import is_packed
from ouro.trace import Trace

DEFAULT_MODEL = "ouro-tiny"
COMPUTE = get_args(Compute)


class _Parser(argparse.ArgumentParser):
    """Says which name was probably meant when a command or an option is misspelt."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if choice:
            message += did_you_mean(choice[1], re.findall(r"[\w-]+", choice[2]))
        elif unknown:
            message += did_you_mean(unknown[1], sorted(self.option_names))
        super().error(message)

    @property
    def option_names(self) -> set[str]:
        """Long options of this parser and of its commands."""
        found = {name for action in self._actions for name in action.option_strings if name.startswith("--")}
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                found |= {name for p in action.choices.values() for name in p.option_names}
        return found


def _model_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("-m", "--model", default=DEFAULT_MODEL, help="packaged name, directory or hub id (default: %(default)s)")
    p.add_argument("--compute", choices=COMPUTE, help="default: bfloat16, or what a packed model was packed for")
    _machine_arguments(p)


def _machine_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--threads", type=int, help="worker threads (default: all processors allowed)")
    p.add_argument("--local-files-only", action="store_true", help="never ask the hub")


SPECULATE: dict[str, Any] = {"auto": "auto", "on": True, "off": False}


def _exit_rule(text: str) -> NamedExit:
    name, _, threshold = text.partition(":")
    try:
        return NamedExit(float(threshold or 0), rule=name)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME:THRESHOLD such as entropy:0.5, got {text!r}") from None


def _sampling_arguments(p: argparse.ArgumentParser, new_tokens: int) -> None:
    p.add_argument("-n", "--max-new-tokens", type=int, default=new_tokens)
    p.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    p.add_argument("--top-k", type=int, default=0)
    p.add_argument("--top-p", type=float, default=1.0)
    p.add_argument("--min-p", type=float, default=0.0)
    p.add_argument("--repetition-penalty", type=float, default=1.0)
    p.add_argument("--seed", type=int)
    p.add_argument("--n-steps", type=int, help="recurrent steps to run (default: as trained)")
    p.add_argument("--exit-at-step", type=int, help="leave every token after this step (0-based)")
    p.add_argument("--exit-threshold", type=float, help="q of Q-exit")
    p.add_argument("--exit-rule", type=_exit_rule, metavar="NAME:THRESHOLD",
                   help="another rule, for instance entropy:0.5, kl:0.01, top1 (ouro.exits; the names are those of the core)")  # fmt: skip
    p.add_argument("--speculate", choices=tuple(SPECULATE), default="auto",
                   help="guess ahead; never changes the text (default: %(default)s)")  # fmt: skip
    p.add_argument("--stats", action="store_true", help="what it cost, on standard error: passes, guesses, tokens per second")
    p.add_argument("--kv-policy", choices=KV_POLICIES, default="full",
                   help="keys and values that new tokens leave; all but full are approximations (default: %(default)s)")  # fmt: skip


def _load(a: argparse.Namespace) -> Model:
    formats = dict(getattr(a, "formats", ()))
    return ouro.load(a.model, compute=a.compute, formats=formats, threads=a.threads, local_files_only=a.local_files_only)


def _sampling(a: argparse.Namespace) -> dict[str, Any]:
    names = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "n_steps",
             "exit_at_step", "exit_threshold", "exit_rule", "kv_policy")  # fmt: skip
    return {name: getattr(a, name) for name in names} | {"speculate": SPECULATE[a.speculate]}


def _say_stats(s: GenerationStats) -> None:
    seconds = s.prefill_seconds + s.decode_seconds
    print(f"{s.prompt_tokens} tokens read ({s.prefix_tokens} of them taken over), {s.tokens} written in {seconds:.2f} s; "
          f"{(s.tokens - 1) / s.decode_seconds if s.decode_seconds else 0:.1f} tokens/s behind the first\n"
          f"{s.passes} passes, {s.lanes} lanes; guesses: {s.guesses} made, {s.kept} kept, {s.dropped} dropped; "
          f"p1 {s.p1:.2f}, p2 {s.p2:.2f}; {s.cache_bytes / 2**20:.1f} MiB of keys and values", file=sys.stderr)  # fmt: skip


def generate(a: argparse.Namespace) -> None:
    """Print a continuation as it comes."""
    model = _load(a)
    with Engine(model, background=False, prefix_cache_bytes=0) as engine:
        handle = engine.submit(a.prompt, stop=a.stop, **_sampling(a))  # refuses before anything is printed
        print(a.prompt, end="", flush=True)
        for piece in handle:
            print(piece, end="", flush=True)
        print(flush=True)
        if a.stats:
            _say_stats(handle.result().stats)


def chat(a: argparse.Namespace) -> None:
    """A conversation on the terminal; ends with an empty line or end of file."""
    model = _load(a)
    messages: list[dict[str, str]] = [{"role": "system", "content": a.system}] if a.system else []
    thinking = True if a.thinking else None
    print(f"{model!r}. An empty line ends the chat.", file=sys.stderr)
    with Engine(model, background=False) as engine:  # keeps what was read for the next turn
        while text := _ask():
            messages.append({"role": "user", "content": text})
            answer = ""
            handle = engine.chat(messages, enable_thinking=thinking, **_sampling(a))
            for piece in handle:
                print(piece, end="", flush=True)
                answer += piece
            print(flush=True)
            if a.stats:
                _say_stats(handle.result().stats)
            messages.append({"role": "assistant", "content": answer})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""


def inspect_table(model: Model, trace: Trace) -> str:
    """One line per token; per step the top token that would follow, its probability, the readout's entropy and p(exit)."""
    ids, p = trace.top_tokens(1)
    tokens = model.token_names(trace.token_ids[0])
    head = f"{'pos':>4} {'token':14}" + "".join(f"| {f'after step {t}':14} prob entropy p(exit) " for t in range(trace.n_steps))
    lines = [head + "| steps", "-" * (len(head) + 7)]
    for i, token in enumerate(tokens):
        line = f"{i:4} {_shown(token):14}"
        for t in range(trace.n_steps):
            top = _shown(model.token_names(ids[t, 0, i])[0])
            line += f"| {top:14} {p[t, 0, i, 0]:.2f} {trace.entropy[t, 0, i]:7.3f} {trace.exit_pdf[t, 0, i]:7.3f} "
        lines.append(line + f"| {trace.expected_steps[0, i]:.2f}")
    return "\n".join(lines)


def _shown(token: str) -> str:
    text = repr(token)[1:-1]
    return text if len(text) <= 14 else text[:13] + "…"


def inspect(a: argparse.Namespace) -> None:
    """What each step would say, token by token."""
    if a.lens and not a.html:
        raise ValueError("--lens is a part of the page that --html writes: give --html FILE too")
    for path in (a.plot, a.html):
        check_output(path)
    model = _load(a)
    text = model.chat_prompt([{"role": "user", "content": a.text}]) if a.chat else a.text
    trace = model.trace(text, n_steps=a.n_steps, logits="none")
    print(inspect_table(model, trace))
    if a.plot:
        from ouro.plots import plot_steps

        figure = plot_steps(trace).figure
        figure.savefig(a.plot, dpi=110, bbox_inches="tight")
        print(f"wrote {a.plot}", file=sys.stderr)
    if a.html:
        from ouro.views import exit_strip, token_view

        view = token_view(trace) + exit_strip(trace)
        if a.lens:
            from ouro.measures import logit_lens
            from ouro.views import lens_table

            view += lens_table(logit_lens(model, text, n_steps=a.n_steps))
        view.save(a.html)
        print(f"wrote {a.html}", file=sys.stderr)


def quantize(a: argparse.Namespace) -> None:
    """Write a packed model: a directory that loads at once (ouro.load(DST), -m DST), and whose model.ouro C programs read."""
    calibrate: Any = a.calibrate is not None
    if isinstance(a.calibrate, Path):
        from ouro.quality import read_texts

        calibrate = read_texts(a.calibrate)
    if a.report:
        check_output(a.json)
    model = ouro.load(a.source, compute=a.compute, formats=dict(a.formats), calibrate=calibrate, threads=a.threads,
                      local_files_only=a.local_files_only)  # fmt: skip
    model.save_packed(a.directory)
    size = sum(p.stat().st_size for p in a.directory.iterdir())
    print(f"wrote {a.directory}, {size:,} bytes, {model.compute}", file=sys.stderr)
    if a.report:
        _report(model, a.source, a)


def report(a: argparse.Namespace) -> None:
    """What a compute costs: states, readouts, loss and exits by step beside float32, on texts."""
    check_output(a.json)
    reference = a.reference or a.model
    if not a.reference and is_packed(resolve(a.model, local_files_only=a.local_files_only)):
        raise ValueError(f"{a.model} is packed: give the checkpoint it was made from with --reference")
    _report(_load(a), reference, a)


def _report(model: Model, reference: str, a: argparse.Namespace) -> None:
    from ouro.quality import quality_report, read_texts

    texts = read_texts(a.texts) if a.texts else None
    float32 = ouro.load(reference, compute="float32", threads=a.threads, local_files_only=a.local_files_only)
    found = quality_report(model, float32, texts)
    print(found.to_markdown() if a.markdown else found)
    if a.json:
        a.json.write_text(json.dumps(found.to_dict(), indent=2) + "\n")


def _report_arguments(p: argparse.ArgumentParser) -> None:
    p.add_argument("--texts", type=Path, metavar="FILE", help="texts to compare on, an empty line between two (default: shipped ones)")
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the report as JSON")
    p.add_argument("--markdown", action="store_true", help="print the report as Markdown tables")


def _formats_argument(p: argparse.ArgumentParser) -> None:
    p.add_argument("--formats", nargs="+", default=(), type=_format, metavar="PART=FORMAT",
                   help="store parts otherwise than usual, e.g. down=int8 head=bfloat16; parts: " + ", ".join(CHOICES))  # fmt: skip


def info(a: argparse.Namespace) -> None:
    """Model, sizes, memory by part, CPU features, kernels in use, BLAS."""
    model = _load(a)
    c, core = model.config, model.info()

    def mib(n: int) -> str:
        return f"{n / 2**20:,.1f} MiB"

    rows = [
        ("model", f"{a.model} ({model.path.name})"),
        ("parameters", f"{c.n_params:,}"),
        ("shape", f"{c.n_layers} layers x {c.n_steps} steps, d_model {c.d_model}, {c.n_heads} heads "
                  f"({c.n_key_value_heads} key/value) of {c.d_head}, d_mlp {c.d_mlp}, vocabulary {c.d_vocab}"),
        ("context", f"{c.n_ctx} tokens"),
        ("compute", f"{model.compute}, keys and values {model.kv_dtype}"),
        ("weights in memory", mib(core["weight_bytes"]) + (", mapped" if core["mapped"] else "")),
        ("  formats", ", ".join(f"{part} {name}" for part, name in core["formats"].items())),
        ("  shared layers", mib(core["layer_bytes"])),
        ("  head, embedding", f"{mib(core['head_bytes'])}, {mib(core['embed_bytes'])}"),
        ("key/value cache", f"{core['kv_page_bytes'] * c.n_steps / 64 / 1024:,.1f} KiB per token at {c.n_steps} steps"),
        ("loaded in", f"{model.load_seconds:.2f} s"),
        ("resident now", mib(_core.resident_memory())),
        ("processor", f"{_core.cpu_count()} usable, {_core.cpu_features()}"),
        ("kernels", f"{core['kernels']}, {core['threads']} threads"),
        ("BLAS", core["blas"] or "not used (exact results; ouro.load(..., compute='float32', exact=False) uses it)"),
    ]  # fmt: skip
    for name, value in rows:
        print(f"{name:18} {value}")


def _format(text: str) -> tuple[str, str]:
    part, equals, name = text.partition("=")
    if not equals or name not in CHOICES.get(part, ()):
        allowed = ", ".join(f"{p}={f}" for p, formats in CHOICES.items() for f in formats)
        raise argparse.ArgumentTypeError(f"{text!r} is none of {allowed}")
    return part, name


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = _Parser(
        prog="ouro",
        description="Run and inspect Ouro looped language models on CPUs.",
        epilog="`ouro COMMAND --help` lists the options of a command. Without -m the packaged model ouro-tiny is used.",
    )
    top.add_argument("--version", action="version", version=f"ouro {ouro.__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    p = commands.add_parser("generate", help="continue a text", description=generate.__doc__)
    p.add_argument("prompt")
    p.add_argument("--stop", action="append", help="text that ends the generation (may be given again)")
    _sampling_arguments(p, 64)
    p.set_defaults(run=generate)
    p = commands.add_parser("chat", help="a conversation", description=chat.__doc__)
    p.add_argument("--system", help="system message")
    p.add_argument("--thinking", action="store_true", help="let the template open a thinking block")
    _sampling_arguments(p, 256)
    p.set_defaults(run=chat)
    p = commands.add_parser("inspect", help="every step, token by token", description=inspect.__doc__)
    p.add_argument("text")
    p.add_argument("--chat", action="store_true", help="put the text into a chat turn first")
    p.add_argument("--n-steps", type=int, help="recurrent steps to run (default: as trained)")
    p.add_argument("--plot", type=bench_command.picture, metavar="FILE", help="also draw it (needs the notebook extra)")
    p.add_argument("--html", type=Path, metavar="FILE", help="also write a page: tokens with a step selector, exit distributions")
    p.add_argument("--lens", action="store_true", help="with --html: also what every layer of every step would say")
    p.set_defaults(run=inspect)
    p = commands.add_parser("quantize", help="write a packed model", description=quantize.__doc__)
    p.add_argument("source", metavar="SRC", help="packaged name, directory or hub id")
    p.add_argument("directory", metavar="DST", type=Path, help="a directory that does not exist yet")
    p.add_argument("--compute", choices=COMPUTE, default="int8", help="default: %(default)s")
    p.add_argument("--calibrate", nargs="?", const=True, type=Path, metavar="FILE",
                   help="choose int4 weights by what they are multiplied with on texts (default: shipped ones)")  # fmt: skip
    p.add_argument("--report", action="store_true", help="then compare with float32, as `ouro report` does")
    _formats_argument(p)
    _report_arguments(p)
    _machine_arguments(p)
    p.set_defaults(run=quantize)
    p = commands.add_parser("report", help="what a compute costs beside float32", description=report.__doc__)
    p.add_argument("--reference", metavar="MODEL", help="what float32 is made from (default: the model, unless that is packed)")
    _formats_argument(p)
    _report_arguments(p)
    p.set_defaults(run=report)
    p = commands.add_parser("info", help="model, memory, processor", description=info.__doc__)
    p.set_defaults(run=info)
    for name, p in commands.choices.items():
        if name != "quantize":
            _model_arguments(p)
    p = commands.add_parser("bench", help="speed beside the machine's limits and peers", description=bench_command.bench.__doc__)
    bench_command.add_arguments(p)
    p.set_defaults(run=bench_command.bench)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 1 after an error that is the user's to mend, 130 after Ctrl-C, 141 (as SIGPIPE) when nobody reads on."""
    a = parser().parse_args(arguments)
    try:
        a.run(a)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more at exit
        return 141
    except (OuroError, ValueError, OSError, MemoryError, ImportError) as error:
        print(f"ouro: {error or type(error).__name__}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
