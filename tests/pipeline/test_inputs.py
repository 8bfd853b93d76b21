import hashlib
import json
import os
from pathlib import Path

import pytest

from align_pipeline.pipeline import inputs
from align_pipeline.pipeline.errors import InputError
from align_pipeline.pipeline.inputs import Digests, Hub, find_function, resolve_file, resolve_function


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"a": 1}\n')
    found = resolve_file("file:rows.jsonl", tmp_path, Digests(None))
    assert found.digest == "sha256:" + hashlib.sha256(b'{"a": 1}\n').hexdigest()
    assert found.path == str(tmp_path / "rows.jsonl")


def test_the_digest_of_a_folder_sees_names_and_contents_but_no_hidden_files(tmp_path: Path):
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "sub" / "weights").write_text("1")
    first = Digests(None).of(model)
    (model / ".cache").mkdir()
    (model / ".cache" / "x").write_text("trace")
    assert Digests(None).of(model) == first
    (model / "sub" / "weights").write_text("2")
    assert Digests(None).of(model) != first
    (model / "sub" / "weights").write_text("1")
    (model / "config.json").rename(model / "other.json")
    assert Digests(None).of(model) != first


def test_a_large_file_is_digested_once_until_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inputs, "REMEMBERED_FROM_BYTES", 4)
    read = []
    real = inputs.file_sha256
    monkeypatch.setattr(inputs, "file_sha256", lambda path: (read.append(path), real(path))[1])
    large, memory = tmp_path / "large", tmp_path / "digests.json"
    large.write_text("12345")
    first = Digests(memory).of(large)
    assert Digests(memory).of(large) == first and len(read) == 1
    assert Digests(memory, rehash=True).of(large) == first and len(read) == 2
    large.write_text("12346")
    os.utime(large, ns=(1, 1))
    assert Digests(memory).of(large) == "sha256:" + hashlib.sha256(b"12346").hexdigest()
    memory.write_text("{ damaged")
    assert Digests(memory).of(large) == "sha256:" + hashlib.sha256(b"12346").hexdigest()


def test_a_missing_file_names_its_neighbour(tmp_path: Path):
    (tmp_path / "preferences.jsonl").touch()
    with pytest.raises(InputError, match=r"preference.jsonl does not exist; did you mean preferences.jsonl\?"):
        resolve_file("file:preference.jsonl", tmp_path, Digests(None))
    with pytest.raises(InputError, match="nor does its folder"):
        resolve_file("file:no/such/file", tmp_path, Digests(None))


def test_a_function_is_found_and_digested_without_being_imported(tmp_path: Path):
    (tmp_path / "rewards.py").write_text("raise RuntimeError('imported')\ndef score(prompts, completions): ...\n")
    found = resolve_function("rewards:score", tmp_path)
    assert found.function == "rewards:score" and found.search_path == str(tmp_path)
    (tmp_path / "rewards.py").write_text("import words\ndef score(prompts, completions): ...\ndef other(): ...\n")
    assert resolve_function("rewards:score", tmp_path).digest != found.digest, "its source changed"
    found = resolve_function("rewards:score", tmp_path)
    assert resolve_function("rewards:other", tmp_path).digest != found.digest, "another function of the module"
    (tmp_path / "words.py").write_text("happy = 1\n")
    beside = resolve_function("rewards:score", tmp_path)
    (tmp_path / "words.py").write_text("happy = 2\n")
    digests = {found.digest, beside.digest, resolve_function("rewards:score", tmp_path).digest}
    assert len(digests) == 3, "what it imports from the same folder changed"
    assert find_function("rewards:scor", tmp_path)[1].endswith("defines no 'scor'; did you mean score?")
    assert "no module 'nowhere'" in find_function("nowhere:score", tmp_path)[1]
    (tmp_path / "broken.py").write_text("def score(:\n")
    assert "broken.py:1: " in find_function("broken:score", tmp_path)[1]
    assert find_function("align_pipeline.pipeline.graph:order", tmp_path)[1] is None


def test_a_hub_reference_resolves_offline_to_the_cached_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    commit = "7ae557604adf67be50417f59c2c2f167def9a775"
    refs = tmp_path / "hub" / "models--org--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text(commit)
    memory = tmp_path / "hub.json"
    found = Hub(memory).resolve("hub:org/name", "model")
    assert (found.hub, found.revision, found.digest) == ("org/name", commit, f"git:{commit}")
    (refs / "main").write_text("0" * 40)
    assert Hub(memory).resolve("hub:org/name", "model").revision == commit, "remembered until --update"
    assert Hub(memory, update=True).resolve("hub:org/name", "model").revision == "0" * 40
    assert json.loads(memory.read_text()) == {"model:org/name@main": "0" * 40}
    with pytest.raises(InputError, match=r"hub:org/other: no answer from the hub .* use file:PATH"):
        Hub(memory).resolve("hub:org/other", "model")


def test_a_function_is_its_helpers_too_wherever_they_lie(tmp_path: Path):
    """A module beside it, a module of a package, and what that imports relatively: each changes the digest."""
    (tmp_path / "pk").mkdir()
    files = {
        "main.py": "from pk.sub import helper\nimport beside\n\ndef score(**_):\n    return []\n",
        "beside.py": "x = 1\n",
        "pk/__init__.py": "",
        "pk/sub.py": "from . import deep\n\ndef helper():\n    return deep.x\n",
        "pk/deep.py": "x = 1\n",
        "pk/beside.py": "x = 1\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    digests = {resolve_function("main:score", tmp_path).digest}
    for name in ("beside.py", "pk/__init__.py", "pk/sub.py", "pk/deep.py"):
        (tmp_path / name).write_text(files[name] + "y = 2\n")
        digests.add(resolve_function("main:score", tmp_path).digest)
    assert len(digests) == 5
    (tmp_path / "pk/beside.py").write_text("y = 2\n")
    assert resolve_function("main:score", tmp_path).digest in digests, "nobody imports it"


def test_a_function_is_python_source(tmp_path: Path):
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*-\n# \xe9\ndef score():\n    pass\n".encode("latin-1"))
    assert find_function("latin:score", tmp_path)[1] is None
    (tmp_path / "broken.py").write_bytes("def score():\n    return '\xe9'\n".encode("latin-1"))
    problem = find_function("broken:score", tmp_path)[1]
    assert problem and "broken.py" in problem
    problem = find_function("_json:make_encoder", tmp_path)[1]
    assert problem and "'_json' is no Python source" in problem
