"""Users, tokens, projects and the log of deeds, as commands."""

from __future__ import annotations

import stat
import subprocess
from typing import Any


def login(flame: Any, token: str, *arguments: str) -> tuple[int, str, str]:
    with flame.begin("login", *arguments, stdin=subprocess.PIPE) as process:
        out, err = process.communicate(token + "\n", timeout=60)
    return process.returncode, out, err


def test_from_no_users_to_a_team(flame: Any, server: Any) -> None:
    assert "must be an admin" in flame.refused("user", "create", "ben")
    made = flame.json("user", "create", "ada", "--role", "admin")
    token = made["token"]["token"]
    assert token.startswith("flm_")
    assert "needs a token" in flame.refused("user", "list")

    status, _, err = login(flame, "flm_wrong", "--server", server.url)
    assert (status, "not this server's token" in err) == (1, True)
    assert not (flame.folder / "config.yaml").exists()
    status, out, _ = login(flame, token, "--server", server.url)
    assert (status, "You are ada (admin)" in out) == (0, True)
    assert stat.S_IMODE((flame.folder / "config.yaml").stat().st_mode) == 0o600
    assert token not in flame("config", "show")

    assert flame.json("user", "whoami") == {"name": "ada", "role": "admin", "projects": ["default"]}
    assert flame.json("project", "create", "trials")["name"] == "trials"
    shown = flame("user", "create", "ben", "--project", "trials")
    theirs = shown.strip().splitlines()[-1]
    assert theirs.startswith("flm_")
    assert "not shown again" in flame.err
    assert [user["name"] for user in flame.json("user", "list")] == ["ada", "ben"]
    assert flame.json("user", "update", "ben", "--role", "viewer")["role"] == "viewer"
    assert flame.json("user", "get", "ben")["projects"] == ["trials"]

    flame.environment["FLAME_TOKEN"] = theirs
    assert flame.json("user", "whoami")["role"] == "viewer"
    assert "'ben' is a viewer" in flame.refused("job", "create", flame.job("mine"))
    assert [one["name"] for one in flame.json("project", "list")] == ["trials"]
    short = flame.json("token", "create", "--days", "1", "--description", "laptop")
    assert [one["description"] for one in flame.json("token", "list")] == ["the first one", "laptop"]
    assert short["token"] not in flame("token", "list")
    flame.environment["FLAME_TOKEN"] = short["token"]
    made = flame.json("token", "create")
    assert made["madeBy"] == short["id"]
    flame.environment["FLAME_TOKEN"] = theirs
    flame("token", "revoke", short["id"], "--descendants")
    flame.environment["FLAME_TOKEN"] = made["token"]
    assert "was revoked" in flame.refused("job", "list")
    flame.environment["FLAME_TOKEN"] = short["token"]
    assert "was revoked" in flame.refused("job", "list")
    del flame.environment["FLAME_TOKEN"]

    assert "has users: ben" in flame.refused("project", "delete", "trials")
    flame("user", "delete", "ben")
    flame("project", "delete", "trials")
    assert "last admin" in flame.refused("user", "delete", "ada")
    refused = [(deed["who"], deed["status"]) for deed in flame.json("audit", "--refused")]
    assert ("ben", 403) in refused
    assert ("anyone", 401) in refused
    assert {deed["who"] for deed in flame.json("audit", "--who", "ada")} == {"ada"}
    table = flame("audit", "--limit", "3")
    assert len(table.strip().splitlines()) == 4
    assert token not in (server.data_dir / "audit.log").read_text()


def test_a_server_takes_its_token_from_a_file_that_holds_one(flame: Any) -> None:
    short = flame.folder / "token"
    short.write_text("short\n")
    assert "too short" in flame.refused("serve", "--token-file", str(short), status=2)
    assert "cannot be read" in flame.refused("serve", "--token-file", str(flame.folder / "nothing"), status=2)
    assert "either" in flame.refused("serve", "--token", "x" * 20, "--token-file", str(short), status=2)


def test_rules_for_an_identity_provider_are_read_strictly(flame: Any) -> None:
    issuer = ("serve", "--oidc-issuer", "https://login.example.org")
    assert "--oidc-audience" in flame.refused(*issuer, status=2)
    whole = (*issuer, "--oidc-audience", "flame", "--oidc-role")
    assert "no rule" in flame.refused(*whole, "admins", status=2)
    assert "no role 'king'" in flame.refused(*whole, "admins=king", status=2)
    assert "must begin with https" in flame.refused(
        "serve", "--port", "0", "--oidc-issuer", "http://login.example.org", *whole[3:], "admins=admin", status=2
    )
