import hashlib

import pytest
from sentences import refused

from hf_power.publish import remote
from hf_power.records.files import git_blob_id

CARD = b"---\nlicense: apache-2.0\n---\n"


@pytest.fixture
def folder(tmp_path):
    """A large file (LFS), a small one, a card, and one in a subfolder."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    contents = {"model.safetensors": b"w" * 50_000, "config.json": b"{}", "README.md": CARD, "sub/a.json": b"[]"}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def api(hub):
    api = remote.client()
    api.create_repo("tester/run")
    return api


def open_(api, repo_id="tester/run", **kwargs):
    return remote.open_repository(api, repo_id, **{"private": None, "lineage": "ours", "overwrite": False} | kwargs)


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def mirrored(hub, revision="main"):
    return {name: data for name, data in hub.files("tester/run", revision).items() if name != ".gitattributes"}


def test_git_blob_id_is_gits(tmp_path):
    (tmp_path / "f").write_bytes(b"hello\n")
    assert git_blob_id(tmp_path / "f") == "ce013625030ba8dba906f756967f9e9ca394464a"  # git hash-object


def test_mirror_brings_every_file_and_sends_nothing_twice(hub, api, folder):
    commit = remote.mirror(api, "tester/run", "main", folder, "first")
    assert mirrored(hub) == contents(folder)
    assert commit == api.repo_info("tester/run").sha
    sent, calls = hub.uploaded_bytes, len(hub.log)
    assert remote.mirror(api, "tester/run", "main", folder, "again") == commit
    assert hub.uploaded_bytes == sent
    assert {call.method for call in hub.log[calls:]} == {"GET"}


def test_only_what_changed_is_sent(hub, api, folder):
    remote.mirror(api, "tester/run", "main", folder, "first")
    (folder / "config.json").write_text('{"changed": 1}')
    sent = hub.uploaded_bytes
    remote.mirror(api, "tester/run", "main", folder, "second")
    assert mirrored(hub) == contents(folder)
    assert hub.uploaded_bytes - sent < 10_000  # a commit, without the 50,000 bytes of weights


def test_weights_of_an_earlier_upload_go_and_other_files_stay(hub, api, folder):
    hub.add_repo(
        "tester/run",
        {
            "model-00001-of-00002.safetensors": b"old",
            "model.safetensors.index.json": b"{}",
            "last-checkpoint/optimizer.pt": b"old",
            "gguf/model.bin": b"somebody's",
            "NOTES.md": b"somebody's",
        },
    )
    remote.mirror(api, "tester/run", "main", folder, "new")
    assert mirrored(hub) == contents(folder) | {"gguf/model.bin": b"somebody's", "NOTES.md": b"somebody's"}


def test_branch_holds_its_own_files_only(hub, api, folder, tmp_path):
    remote.mirror(api, "tester/run", "main", folder, "main")
    other = tmp_path / "other"
    other.mkdir()
    (other / "trainer_state.json").write_text("{}")
    remote.mirror(api, "tester/run", "trunk-2.1B-tokens", other, "checkpoint")
    assert mirrored(hub, "trunk-2.1B-tokens") == {"trainer_state.json": b"{}"}
    assert mirrored(hub) == contents(folder)


def test_damaged_upload_is_found(hub, api, folder):
    hub.fault("truncate", times=1)
    with pytest.raises(remote.IncompletePushError, match=r"^model\.safetensors of tester/run@main differ") as caught:
        remote.mirror(api, "tester/run", "main", folder, "first")
    assert remote.is_passing(caught.value)
    remote.mirror(api, "tester/run", "main", folder, "again")
    weights = hub.files("tester/run")["model.safetensors"]
    assert hashlib.sha256(weights).hexdigest() == hashlib.sha256(b"w" * 50_000).hexdigest()


@pytest.mark.parametrize(
    ("fault", "passing", "text"),
    [
        ("401", False, "the Hub refused the token (401): log in again"),
        ("404", False, "there is no such repository, or the token may not see it (404)"),
        ("500", True, "the Hub failed (500)"),
        ("503", True, "the Hub failed (503)"),
        ("quota", False, "the Hub refused the upload (403): Private repository storage limit reached"),
        ("cut", True, "cannot be reached"),
        ("down", True, "cannot be reached"),
    ],
)
def test_each_fault_has_a_sentence_and_says_whether_to_try_again(hub, api, folder, fault, passing, text):
    hub.down() if fault == "down" else hub.fault(fault)
    with pytest.raises(Exception) as caught:
        remote.mirror(api, "tester/run", "main", folder, "first")
    assert remote.is_passing(caught.value) is passing
    assert text in remote.explain(caught.value)
    assert hub.token not in remote.explain(caught.value)


def test_a_hub_that_never_answers_is_given_up(hub, folder, monkeypatch):
    monkeypatch.setattr(remote, "SILENCE", 0.2)
    api = remote.client()
    hub.fault("slow", seconds=600)  # 3 s, see the fixture; an answer after them would be no error
    with pytest.raises(Exception) as caught:
        open_(api)
    assert remote.is_passing(caught.value)
    assert "cannot be reached (ReadTimeout)" in remote.explain(caught.value)


def test_patience_ends_after_its_attempts_and_at_once_where_it_is_no_use(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0, 0))
    said = []

    def attempts(error, needed):
        calls = []

        def attempt():
            calls.append(1)
            if len(calls) < needed:
                raise error
            return len(calls)

        return attempt, calls

    attempt, calls = attempts(ConnectionError("down"), 3)
    assert remote.with_patience(attempt, said.append) == 3
    assert len(said) == 2
    attempt, calls = attempts(ConnectionError("down"), 4)
    with pytest.raises(ConnectionError):
        remote.with_patience(attempt, said.append)
    assert len(calls) == 3
    attempt, calls = attempts(ValueError("wrong"), 3)
    with pytest.raises(ValueError, match="wrong"):
        remote.with_patience(attempt, said.append)
    assert len(calls) == 1


def test_open_makes_a_repository_and_completes_its_name(hub):
    assert open_(remote.client(), "new", private=True) == "tester/new"
    assert set(hub.files("tester/new")) == {".gitattributes"}
    assert remote.client().repo_info("tester/new").private


def test_a_repository_of_this_run_is_its_own_and_another_is_not(hub, api):
    hub.add_repo("tester/ours", {"run.json": b'{"lineage": "ours"}'})
    hub.add_repo("tester/theirs", {"run.json": b'{"lineage": "theirs"}'})
    hub.add_repo("tester/else", {"README.md": CARD})
    assert open_(api) == "tester/run"
    assert open_(api, "tester/ours") == "tester/ours"
    for name in ("tester/theirs", "tester/else"):
        with refused(ValueError, f"the repository {name} holds something else already", "--overwrite"):
            open_(api, name)
        assert open_(api, name, overwrite=True) == name


def test_foreign_namespace_and_read_token(hub, api):
    with pytest.raises(Exception) as caught:
        open_(api, "stranger/run")
    assert "403" in remote.explain(caught.value)
    assert not remote.is_passing(caught.value)
    with pytest.raises(Exception) as caught:
        open_(remote.client(hub.read_token))
    assert "403" in remote.explain(caught.value)
    assert not remote.is_passing(caught.value)


def test_no_token_and_hub_switched_off(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    with refused(ValueError, "there is no token for the Hub", "hf auth login", "HF_TOKEN"):
        remote.client()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with refused(ValueError, "HF_HUB_OFFLINE is set", "unset it"):
        remote.client("hf_x")


@pytest.mark.parametrize("name", ["a/b/c", "user/-name", "user/na me", "user/x--y", "x" * 97, ""])
def test_malformed_names(name):
    with refused(ValueError, repr(name), "user/name"):
        remote.check_repo_id(name)
