"""Inputs: what a field names, found on disk or on the hub, and digested by content.

Digests are sha256 of content, so that a copied or touched file is still the same input. Those of large files are
remembered by (path, size, mtime, inode); `--rehash` forgets them.
"""

from __future__ import annotations

import ast
import importlib.machinery
import importlib.util
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from align_pipeline.pipeline.errors import InputError, did_you_mean
from align_pipeline.pipeline.files import canonical_digest, file_sha256, shown, visible_files, write_json
from align_pipeline.pipeline.stage import Resolved

REMEMBERED_FROM_BYTES = 64 * 2**20


class Digests:
    """Content digests of files and folders, with a memory for the large ones."""

    def __init__(self, memory: Path | None, rehash: bool = False) -> None:
        self._memory = memory
        self._known: dict[str, str] = {}
        if memory is not None and memory.exists() and not rehash:
            try:
                self._known = json.loads(memory.read_text(encoding="utf-8"))
            except ValueError:
                self._known = {}  # a memory only: what is damaged is computed again

    def of(self, path: Path) -> str:
        """Return the digest of a file, or of a folder: that of its files' names and digests.

        Hidden files and folders inside a folder do not count: they are caches and editors' traces.
        """
        if path.is_dir():
            files = {str(file.relative_to(path)): self._file(file) for file in visible_files(path)}
            return canonical_digest(files)
        return "sha256:" + self._file(path)

    def _file(self, path: Path) -> str:
        status = path.stat()
        if status.st_size < REMEMBERED_FROM_BYTES:
            return file_sha256(path)
        mark = f"{path.resolve()}|{status.st_size}|{status.st_mtime_ns}|{status.st_ino}"
        if mark not in self._known:
            self._known[mark] = file_sha256(path)
            if self._memory is not None:
                self._memory.parent.mkdir(parents=True, exist_ok=True)
                write_json(self._memory, self._known)
        return self._known[mark]


def resolve_file(ref: str, folder: Path, digests: Digests) -> Resolved:
    """Resolve `file:PATH`; a relative path starts at the pipeline file's folder."""
    path = file_path(ref, folder)
    if not path.exists():
        raise InputError(missing_file(path))
    return Resolved(ref=ref, digest=digests.of(path), path=str(path))


def file_path(ref: str, folder: Path) -> Path:
    """Return the absolute path that `file:PATH` means in a pipeline file that lies in `folder`."""
    return (folder / Path(ref.removeprefix("file:")).expanduser()).absolute()


def missing_file(path: Path) -> str:
    """Say that a path does not exist, and name what lies near it."""
    if path.is_symlink():
        return f"{shown(path)} is a link to {path.readlink()}, which does not exist"
    parent = path.parent
    if not parent.is_dir():
        return f"{shown(path)} does not exist, nor does its folder; paths start at the folder of the pipeline file"
    names = [entry.name for entry in parent.iterdir()]
    return f"{shown(path)} does not exist{did_you_mean(path.name, names)}"


def find_function(ref: str, folder: Path) -> tuple[Path, str | None]:
    """Return the source file of `module:function`, and what is wrong with it (None when it is there).

    Nothing is imported but the parent packages of the module: the function's existence is read from its source.
    """
    module, name = ref.split(":")
    with searching(folder):
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            spec = None
    if spec is None or not spec.origin or not Path(spec.origin).is_file():
        return folder, f"no module {module!r} in {folder} nor among the installed ones"
    source = Path(spec.origin)
    if source.suffix != ".py":
        return source, f"{module!r} is no Python source ({source.name}); wrap {name!r} in a function of a .py file"
    try:
        tree = ast.parse(source.read_bytes())
    except SyntaxError as error:
        return source, f"{source}:{error.lineno}: {error.msg}"
    except ValueError:
        return source, f"{source}: it cannot be read as Python source; save it as UTF-8, or name its encoding"
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    for node in tree.body:
        if isinstance(node, ast.Assign):
            names.update(target.id for target in node.targets if isinstance(target, ast.Name))
        if isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name for alias in node.names)
    if name not in names:
        return source, f"{source} defines no {name!r}{did_you_mean(name, names)}"
    return source, None


def resolve_function(ref: str, folder: Path) -> Resolved:
    """Resolve `module:function` to a digest of its name and of the source of every module beside it that it imports."""
    source, problem = find_function(ref, folder)
    if problem:
        raise InputError(problem)
    found = _modules(source, folder, {source})
    sources = {
        path.relative_to(folder).as_posix() if path.is_relative_to(folder) else path.name: file_sha256(path)
        for path in found
    }
    digest = canonical_digest({"function": ref, "sources": sources})
    return Resolved(ref=ref, digest=digest, function=ref, search_path=str(folder))


def _modules(source: Path, folder: Path, seen: set[Path]) -> set[Path]:
    """Return a module's file and those of the modules in `folder` that it imports, directly or not."""
    for node in ast.walk(ast.parse(source.read_bytes())):
        for path in _imported(node, source, folder):
            if path.is_file() and path not in seen:
                seen |= _modules(path, folder, seen | {path})
    return seen


def _imported(node: ast.AST, source: Path, folder: Path) -> Iterator[Path]:
    """Yield the files below `folder` that an import statement would run, packages on the way included."""
    root, names = folder, list[str]()
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        root = source.parents[node.level - 1] if node.level else folder
        module = [node.module] if node.module else []
        names = [".".join([*module, alias.name]) for alias in node.names]
    for name in names:
        parts = name.split(".")
        for depth in range(1, len(parts) + 1):
            path = root.joinpath(*parts[:depth])
            yield path.with_name(f"{path.name}.py")
            yield path / "__init__.py"


@contextmanager
def searching(folder: Path) -> Iterator[None]:
    """Import from `folder` first, as Python does for a script that lies there."""
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))


class Hub:
    """Commits of hub repositories: asked for once, then remembered until `--update`."""

    def __init__(self, memory: Path, update: bool = False) -> None:
        self._memory = memory
        self._known: dict[str, str] = {}
        if memory.exists() and not update:
            try:
                self._known = json.loads(memory.read_text(encoding="utf-8"))
            except ValueError:
                self._known = {}  # a memory only: what is damaged is asked for again

    def resolve(self, ref: str, repo_type: str) -> Resolved:
        """Resolve `hub:ORG/NAME[@REV]` to a commit; without a network, to the local copy's."""
        name, _, revision = ref.removeprefix("hub:").partition("@")
        mark = f"{repo_type}:{name}@{revision or 'main'}"
        if mark not in self._known:
            self._known[mark] = _commit(name, revision or "main", repo_type)
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._memory, self._known)
        commit = self._known[mark]
        return Resolved(ref=ref, digest=f"git:{commit}", hub=name, revision=commit)


def _commit(name: str, revision: str, repo_type: str) -> str:
    """Ask the hub for the commit of a revision; fall back to the one in the local cache."""
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    folder = Path(constants.HF_HUB_CACHE) / f"{repo_type}s--{name.replace('/', '--')}"
    problem: Exception
    try:
        info = HfApi().repo_info(name, revision=revision, repo_type=repo_type, timeout=20)
        if info.sha:
            return str(info.sha)
        problem = ValueError("the hub named no commit")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        problem = error
    except Exception as error:  # the HTTP library's own errors, whichever it is in this release
        if type(error).__module__.split(".")[0] not in {"httpx", "httpcore", "requests"}:
            raise
        problem = error
    reference = folder / "refs" / revision
    if reference.is_file():
        return reference.read_text(encoding="utf-8").strip()
    if (folder / "snapshots" / revision).is_dir():
        return revision
    first_line = (str(problem).strip().splitlines() or [type(problem).__name__])[0]
    raise InputError(
        f"hub:{name}: no answer from the hub for revision {revision!r} ({first_line}), and no copy in {folder.parent}; "
        "check the name and the network, log in with `hf auth login` if it is gated, or use file:PATH"
    )


def resolve_reference(ref: str, repo_type: str, folder: Path, digests: Digests, hub: Hub) -> Resolved:
    """Resolve any reference but `stage:NAME`; a hub repository is a `model` or a `dataset`."""
    if ref.startswith("file:"):
        return resolve_file(ref, folder, digests)
    if ref.startswith("hub:"):
        return hub.resolve(ref, repo_type)
    return resolve_function(ref, folder)


def digests_of(inputs: Mapping[str, Resolved]) -> dict[str, str]:
    """Return what enters a key: field name -> digest; an adapter counts together with its base."""
    return {name: one.digest + (f"+{one.base.digest}" if one.base else "") for name, one in sorted(inputs.items())}
