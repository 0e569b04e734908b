"""The Hub of the tests, seen by the real client; tests of pushes see it through from_pretrained and training runs."""

import hashlib
import importlib
import time
from pathlib import Path

import pytest
from hub import Hub, pointed_at
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

httpx = importlib.import_module(HTTPError.__module__)  # httpx2 under huggingface_hub 2, httpx under 1
WEIGHTS = bytes(range(256)) * 200
CARD = b"---\nlicense: apache-2.0\n---\nA model.\n"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with Hub() as hub, pointed_at(hub, monkeypatch, tmp_path / "home"):
        yield hub


@pytest.fixture
def api(hub):
    hub.add_repo("tester/tiny", {"config.json": b"{}"})
    return HfApi()


@pytest.fixture
def folder(tmp_path):
    """Two regular files and two LFS files, one of each in a folder."""
    files = {"README.md": CARD, "model.safetensors": WEIGHTS, "sub/run.json": b"{}", "sub/scheduler.pt": b"scheduler"}
    for name, data in files.items():
        (tmp_path / "up" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "up" / name).write_bytes(data)
    return tmp_path / "up"


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob("*") if p.is_file()}


def upload(api, data, name="model.safetensors", **keywords):
    return api.create_commit("tester/tiny", [CommitOperationAdd(name, data)], commit_message="upload", **keywords)


def test_a_folder_goes_up_and_comes_down(hub, folder, tmp_path):
    api = HfApi()
    api.create_repo("tester/new")
    api.upload_folder(repo_id="tester/new", folder_path=folder, commit_message="A run")
    expected = contents(folder)
    remote = hub.files("tester/new")
    assert remote.pop(".gitattributes")
    assert remote == expected
    assert hub.uploaded_bytes == len(WEIGHTS) + len(b"scheduler")
    snapshot = contents(snapshot_download("tester/new", cache_dir=tmp_path / "fresh"))
    assert snapshot.pop(".gitattributes")
    assert snapshot == expected


def test_tree_has_the_sizes_and_hashes_that_git_would_give(api, hub, folder):
    api.upload_folder(repo_id="tester/tiny", folder_path=folder)
    tree = {entry.path: entry for entry in api.list_repo_tree("tester/tiny", recursive=True)}
    assert set(tree) == {*contents(folder), "config.json"}
    assert tree["config.json"].blob_id == "9e26dfeeb6e641a33dae4961196235bdb965b21b"  # git's, of a file with {}
    assert tree["config.json"].lfs is None
    assert tree["model.safetensors"].size == tree["model.safetensors"].lfs.size == len(WEIGHTS)
    assert tree["model.safetensors"].lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    assert [entry.path for entry in api.list_repo_tree("tester/tiny", "sub")] == ["sub/run.json", "sub/scheduler.pt"]
    siblings = {s.rfilename: s for s in api.model_info("tester/tiny", files_metadata=True).siblings}
    assert siblings["model.safetensors"].lfs.sha256 == tree["model.safetensors"].lfs.sha256
    checked = api.verify_repo_checksums("tester/tiny", local_dir=folder)
    assert checked.checked_count == 4
    assert not checked.mismatches


def test_what_is_stored_is_not_sent_again(api, hub, folder):
    first = api.upload_folder(repo_id="tester/tiny", folder_path=folder)
    sent = hub.uploaded_bytes
    assert api.upload_folder(repo_id="tester/tiny", folder_path=folder).oid == first.oid
    api.create_repo("tester/copy")
    api.upload_folder(repo_id="tester/copy", folder_path=folder)
    assert hub.files("tester/copy")["model.safetensors"] == WEIGHTS
    assert hub.uploaded_bytes == sent
    assert len(hub.seen("^POST .*/commit/main")) == 2


def test_branches_hold_their_own_trees(api, hub):
    api.create_branch("tester/tiny", branch="step-100")
    upload(api, b"100", revision="step-100")
    api.create_branch("tester/tiny", branch="step-200", revision="step-100")
    upload(api, b"200", revision="step-200")
    assert hub.files("tester/tiny") == {"config.json": b"{}"}
    assert [hub.files("tester/tiny", f"step-{n}")["model.safetensors"] for n in (100, 200)] == [b"100", b"200"]
    refs = api.list_repo_refs("tester/tiny")
    assert api.model_info("tester/tiny", revision="step-100").sha in {b.target_commit for b in refs.branches}
    assert [b.name for b in refs.branches] == ["main", "step-100", "step-200"]
    with pytest.raises(RevisionNotFoundError):
        upload(api, b"100", revision="step-300")


def test_commits_and_references_that_exist(api, hub):
    old = upload(api, b"1").oid
    new = upload(api, b"2").oid
    assert [hub.files("tester/tiny", revision)["model.safetensors"] for revision in (old, new)] == [b"1", b"2"]
    assert [c.commit_id for c in api.list_repo_commits("tester/tiny")[:2]] == [new, old]
    for make in (
        lambda ok: api.create_branch("tester/tiny", branch="main", exist_ok=ok),
        lambda ok: api.create_repo("tester/tiny", exist_ok=ok),
    ):
        make(True)
        with pytest.raises(HfHubHTTPError, match="409"):
            make(False)


def test_files_are_deleted_and_a_commit_on_an_old_parent_is_refused(api, hub, folder):
    start = api.upload_folder(repo_id="tester/tiny", folder_path=folder).oid
    api.delete_folder("sub", "tester/tiny")
    api.delete_file("README.md", "tester/tiny")
    assert set(hub.files("tester/tiny")) == {"config.json", "model.safetensors"}
    with pytest.raises(EntryNotFoundError):
        api.delete_file("README.md", "tester/tiny")
    with pytest.raises(HfHubHTTPError, match="412"):
        upload(api, b"new", parent_commit=start)


def test_tokens(api, hub):
    assert api.whoami()["name"] == "tester"
    assert api.whoami(token=hub.read_token)["auth"]["accessToken"]["role"] == "read"
    api.auth_check("tester/tiny", write=True)
    with pytest.raises(HfHubHTTPError, match="Invalid user token"):
        api.whoami(token="hf_wrong")
    for token, status in ((hub.read_token, 403), ("hf_wrong", 401)):
        for call in (
            lambda token=token: api.auth_check("tester/tiny", write=True, token=token),
            lambda token=token: api.create_repo("tester/other", token=token),
            lambda token=token: upload(api, b"1", token=token),
        ):
            with pytest.raises(HfHubHTTPError) as caught:
                call()
            assert caught.value.response.status_code == status
    with pytest.raises(HfHubHTTPError, match="rights to create a model"):
        api.create_repo("stranger/x")
    api.create_repo("tester/tiny", exist_ok=True, token=hub.read_token)  # the client hides the 403 of what exists
    api.create_repo("lab/x")


def test_what_is_not_there_or_not_ours(api, hub):
    hub.add_repo("tester/secret", {"config.json": b"{}"}, private=True)
    hub.add_repo("stranger/secret", {"config.json": b"{}"}, private=True)
    hub.add_repo("stranger/gated", {"config.json": b"{}"}, gated="auto")
    for repo, token in (("tester/none", None), ("tester/secret", False), ("stranger/secret", None)):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(repo, token=token)
    assert api.model_info("tester/secret", token=hub.read_token).private
    with pytest.raises(RevisionNotFoundError):
        api.model_info("tester/tiny", revision="none")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("tester/tiny", "none.json")
    assert api.model_info("stranger/gated").gated == "auto"
    with pytest.raises(GatedRepoError):
        hf_hub_download("stranger/gated", "config.json")
    with pytest.raises(GatedRepoError):
        api.auth_check("stranger/gated")


def test_model_cards(api, hub, tmp_path):
    ModelCard(CARD.decode()).save(tmp_path / "README.md")  # push_to_hub of huggingface_hub 1 asks huggingface.co itself
    api.upload_folder(repo_id="tester/tiny", folder_path=tmp_path, allow_patterns="README.md")
    assert ModelCard.load("tester/tiny").data.license == "apache-2.0"
    assert api.model_info("tester/tiny").card_data["license"] == "apache-2.0"
    (tmp_path / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_folder(repo_id="tester/tiny", folder_path=tmp_path, allow_patterns="README.md")


@pytest.mark.parametrize(
    ("kind", "error", "says"),
    [
        ("401", HfHubHTTPError, "401"),
        ("404", RepositoryNotFoundError, "404"),
        ("500", HfHubHTTPError, "500"),
        ("503", HfHubHTTPError, "503"),
        ("cut", httpx.RemoteProtocolError, "disconnected"),
    ],
)
def test_a_commit_that_fails_is_not_tried_again_and_changes_nothing(api, hub, kind, error, says):
    hub.fault(kind, times=1, match="/commit/")
    with pytest.raises(error, match=says):
        upload(api, b"1", "a.txt")
    assert hub.files("tester/tiny") == {"config.json": b"{}"}
    assert len(hub.seen("/commit/")) == 1
    upload(api, b"1", "a.txt")
    assert hub.files("tester/tiny")["a.txt"] == b"1"


def test_a_commit_whose_answer_is_lost_is_there(api, hub):
    hub.fault("lost", times=1, match="/commit/")
    with pytest.raises(httpx.RemoteProtocolError):
        upload(api, b"1", "a.txt")
    assert hub.files("tester/tiny")["a.txt"] == b"1"


@pytest.mark.parametrize("kind", ["503", "cut"])
def test_an_upload_that_fails_once_is_tried_again(api, hub, kind):
    hub.fault(kind, times=1, match="^PUT ")
    upload(api, WEIGHTS)
    assert hub.files("tester/tiny")["model.safetensors"] == WEIGHTS
    received = [call.received for call in hub.seen("^PUT ")]
    assert received == [len(WEIGHTS) // (2 if kind == "cut" else 1), len(WEIGHTS)]


def test_an_upload_that_is_refused(api, hub):
    hub.fault("404", match="^PUT ")
    with pytest.raises(RuntimeError, match=r"Error while uploading 'model.safetensors'") as caught:
        upload(api, WEIGHTS)
    assert isinstance(caught.value.__cause__, HfHubHTTPError)


def test_quota(api, hub):
    hub.fault("quota")
    with pytest.raises(HfHubHTTPError, match="storage limit reached") as caught:
        upload(api, WEIGHTS)
    assert caught.value.response.status_code == 403
    assert not hub.uploaded_bytes


def test_only_a_check_against_the_remote_finds_what_was_truncated(api, hub):
    hub.fault("truncate", times=1)
    upload(api, WEIGHTS)
    hub.fault("truncate", times=1, match="/commit/")
    upload(api, b"12", "a.txt")
    sizes = {entry.path: entry.size for entry in api.list_repo_tree("tester/tiny")}
    assert sizes == {"config.json": 2, "model.safetensors": len(WEIGHTS) // 2, "a.txt": 1}
    upload(api, WEIGHTS)
    upload(api, b"12", "a.txt")
    assert hub.files("tester/tiny") == {"config.json": b"{}", "model.safetensors": WEIGHTS, "a.txt": b"12"}


def test_a_hub_that_goes_down_comes_up_with_what_it_had(api, hub):
    url = hub.url
    hub.fault("down", times=1, match="/commit/")
    with pytest.raises(httpx.TransportError):
        upload(api, WEIGHTS)
    with pytest.raises(httpx.ConnectError):
        api.whoami()
    hub.up()
    assert hub.url == url
    upload(api, WEIGHTS)
    assert hub.uploaded_bytes == len(WEIGHTS)
    assert hub.files("tester/tiny")["model.safetensors"] == WEIGHTS


def test_a_slow_hub(api, hub):
    hub.fault("slow", times=1, match="whoami", seconds=0.2)
    hub.fault("slow", times=1, match="^PUT ", rate=len(WEIGHTS) / 0.3)
    start = time.monotonic()
    api.whoami()
    assert time.monotonic() - start > 0.2
    start = time.monotonic()
    upload(api, WEIGHTS)
    assert time.monotonic() - start > 0.3


def test_a_fault_comes_after_some_requests_for_some_requests(api, hub):
    hub.fault("500", match="whoami", after=1, times=1)
    api.whoami()
    with pytest.raises(HfHubHTTPError, match="500"):
        api.whoami()
    api.whoami()
    assert [call.status for call in hub.log] == [200, 500, 200]


def test_a_download_that_is_cut_goes_on_where_it_was(api, hub, monkeypatch):
    hub.add_repo("tester/tiny", {"model.safetensors": WEIGHTS})
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # what was received of a last chunk is lost
    hub.fault("cut", times=1, match="^GET .*/resolve/")
    assert Path(hf_hub_download("tester/tiny", "model.safetensors")).read_bytes() == WEIGHTS
    assert [call.status for call in hub.seen("^GET .*/resolve/")] == [200, 206]


def test_the_client_is_given_back(tmp_path, monkeypatch):
    import transformers.utils.hub

    def state():
        names = [name for name in vars(constants) if name.isupper()]
        return [getattr(constants, name) for name in names], transformers.utils.hub._hf_api, HfApi().endpoint

    before = state()
    with Hub() as hub:
        with pointed_at(hub, monkeypatch, tmp_path):
            HfApi().whoami()
        assert state() == before
        with pytest.raises(OfflineModeIsEnabled):
            HfApi(endpoint=hub.url).whoami(token=hub.token)
        assert len(hub.log) == 1
