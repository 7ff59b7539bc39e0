"""Settings: four sources in order, one sentence for what is wrong, and a printed file that gives the same again."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError

from tdm_app.settings import LOCAL_HOSTS, Settings
from tdm_app.settings_sources import MASK, flag_of, load, show
from tdm_serve.cli.main import main
from tdm_serve.errors import ConfigError

SECRET = "a-long-admin-key-of-a-test"
Refused = Callable[[list[str]], str]


@pytest.fixture(autouse=True)
def only_what_a_test_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("TDM_SERVE_"):
            monkeypatch.delenv(name)


def test_flags_beat_environment_beats_file_beats_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "serve.toml"
    file.write_text('port = 1\nmax_images = 2\nwarm = ["64x64", "128x128"]\nhost = "::1"\n')
    monkeypatch.setenv("TDM_SERVE_CONFIG", str(file))
    monkeypatch.setenv("TDM_SERVE_PORT", "3")
    monkeypatch.setenv("TDM_SERVE_HOST", "127.0.0.2")
    monkeypatch.setenv("TDM_SERVE_DTYPE", "")  # as good as unset
    settings, sources = load({"port": "4"})
    assert (settings.port, settings.host, settings.max_images, settings.dtype) == (4, "127.0.0.2", 2, "auto")
    assert settings.warm == ("64x64", "128x128")
    assert [sources[name] for name in ("port", "host", "max_images", "dtype", "config")] == [
        "--port",
        "TDM_SERVE_HOST",
        str(file),
        "default",
        "TDM_SERVE_CONFIG",
    ]


def test_lists_and_none_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_SERVE_MODEL", "default, default-teacher")
    monkeypatch.setenv("TDM_SERVE_MEMORY_MB", "none")
    monkeypatch.setenv("TDM_SERVE_PAGE", "false")
    settings = Settings()
    assert (settings.model, settings.memory_mb, settings.page) == (("default", "default-teacher"), None, False)


def test_a_program_sets_them_too() -> None:
    assert Settings(port=0, feedback=True).feedback
    with pytest.raises(ValidationError, match="max_batch"):
        Settings(max_batch=0)


BAD = {
    "port": ("port", "65536", "port is '65536' (--port); allowed: a whole number, 0 to 65535"),
    "batch": ("max_batch", "0", "max_batch is '0' (--max-batch); allowed: a whole number, 1 or more or none"),
    "seconds": ("keepalive_s", "inf", "keepalive_s is 'inf' (--keepalive-s); allowed: a number above 0"),
    "words": ("log_format", "xml", "log_format is 'xml' (--log-format); allowed: text, json"),
    "sizes": ("warm", ("64",), "warm is ('64',) (--warm); size '64' is not of the form WIDTHxHEIGHT, such as 128x128"),
    "no model": ("model", (), "model is () (--model); allowed: a list of texts, at least one"),
    "address": ("public_url", "a b", "public_url is 'a b' (--public-url); allowed: text like ^https?"),
}


@pytest.mark.parametrize(("name", "value", "sentence"), BAD.values(), ids=BAD)
def test_bad_values(name: str, value: object, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({name: value})
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_bad_values_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_SERVE_PAGE", "perhaps")
    with pytest.raises(ConfigError, match=r"^page is 'perhaps' \(TDM_SERVE_PAGE\); allowed: true or false$"):
        load()


def test_a_variable_that_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_SERVE_MAX_BACH", "2")
    with pytest.raises(ConfigError, match=r"^TDM_SERVE_MAX_BACH is no setting; did you mean TDM_SERVE_MAX_BATCH"):
        load()


FILES = {
    "unknown key": ("prot = 80\n", "unknown setting 'prot'; did you mean port?"),
    "nothing near": ("zzzzzzzzz = 80\n", "unknown setting 'zzzzzzzzz'; known: config, state_dir, model"),
    "bad value": ("port = -1\n", "port is -1 ("),
    "no TOML": ("port 80\n", "is not a TOML file"),
    "another file": ('config = "x"\n', "cannot name another one"),
}


@pytest.mark.parametrize(("text", "sentence"), FILES.values(), ids=FILES)
def test_bad_files(text: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load({"config": str(file)})
    assert sentence in str(caught.value)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match=r"^cannot read the settings file no/such.toml: No such file or directory$"):
        load({"config": "no/such.toml"})


def test_bad_settings_exit_2(refused: Refused) -> None:
    assert refused(["serve", "--auth", "yes"]) == "error: auth is 'yes' (--auth); allowed: auto, on, off\n"


def test_unknown_flag_exits_2(refused: Refused) -> None:
    assert "--max-bach" in refused(["serve", "--max-bach", "2"])


def test_printed_settings_give_the_same_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TDM_SERVE_ADMIN_KEY", SECRET)
    monkeypatch.setenv("TDM_SERVE_CORS_ORIGINS", "http://a.example,http://b.example")
    folder = tmp_path / 'a "quoted" folder'
    options = ["--port", "0", "--no-page", "--memory-mb", "4000", "--state-dir", str(folder), "--model", "a,b"]
    assert main(["serve", "--print-config", *options]) == 0
    printed = capsys.readouterr().out
    assert SECRET not in printed
    assert f"# admin_key = {MASK}  # TDM_SERVE_ADMIN_KEY" in printed
    assert "port = 0  # --port\n" in printed
    assert 'log_format = "text"  # default\n' in printed
    assert not folder.exists()  # looking changes nothing

    file = tmp_path / "printed.toml"
    file.write_text(printed)
    before = load({"port": 0, "page": False, "memory_mb": 4000, "state_dir": folder, "model": ("a", "b")})[0]
    after, sources = load({"config": file})
    assert after.model_copy(update={"config": None}) == before
    assert tomllib.loads(printed).keys() <= Settings.model_fields.keys()
    assert SECRET not in repr(after) + show(after, sources)


def test_a_short_admin_key_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TDM_SERVE_ADMIN_KEY", "hunter2")
    with pytest.raises(ConfigError) as caught:
        load()
    assert "20 or more" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_help_has_every_setting_but_secrets(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for name in Settings.model_fields:
        assert (f"{flag_of(name)} " in text or f"{flag_of(name)}," in text) is (name != "admin_key"), name


def test_where_the_state_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert Settings().state_dir == tmp_path / "tdm-serve"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Settings().state_dir == tmp_path / ".local" / "state" / "tdm-serve"
    monkeypatch.setattr(Path, "home", _no_home)
    with pytest.raises(ConfigError, match="no home folder; name one for the state with --state-dir"):
        load()
    assert load({"state_dir": str(tmp_path)})[0].state_dir == tmp_path


def _no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    ("given", "loopback", "auth", "hosts"),
    [
        ({}, True, "off", LOCAL_HOSTS),
        ({}, False, "on", ()),
        ({"auth": "on"}, True, "on", LOCAL_HOSTS),
        ({"allow_open": True}, False, "off", ()),
        ({"auth": "off", "allow_open": True}, False, "off", ()),
        ({"allowed_hosts": ("draw.example",)}, True, "off", ("draw.example",)),
    ],
)
def test_what_follows_from_the_address(given: dict[str, object], loopback: bool, auth: str, hosts: tuple[str]) -> None:
    bound = Settings.model_validate(given).bound_to(loopback)
    assert (bound.auth, bound.allowed_hosts) == (auth, hosts)


def test_no_keys_on_a_public_address_must_be_said_twice() -> None:
    with pytest.raises(ConfigError, match=r"'0\.0\.0\.0', which others can reach, and auth is 'off'.*--allow-open"):
        Settings(host="0.0.0.0", auth="off").bound_to(loopback=False)
