import json

import pytest

from deploy.common.certificates import node_key
from deploy.operator.members import Members, admit
from fedtune_strategies.errors import ResourceError
from server_app.members import MEMBERS_FILE, listed_members, read_members


def test_the_list_is_what_the_operator_s_commands_wrote(tmp_path, monkeypatch):
    monkeypatch.delenv(MEMBERS_FILE, raising=False)
    assert listed_members() is None
    members = Members(tmp_path)
    monkeypatch.setenv(MEMBERS_FILE, str(tmp_path / "members.json"))
    assert listed_members()() == {}
    for number, name in enumerate(["alice", "bob", "carol"], start=1):
        key = node_key(tmp_path / name, "key").public.read_text().strip()
        member = members.apply(members.invite(name, 60)[0], key, approval=name == "carol")
        admit(members, member, lambda key, name, number=number: number, print)
    members.change("bob", "revoked", expected=("member",))
    assert listed_members()() == {1: "alice"}
    for text in ("{", "[1]", json.dumps({"a": {}}), json.dumps({"a": {"state": "member", "node_id": "x"}})):
        (tmp_path / "members.json").write_text(text)
        with pytest.raises(ResourceError, match="cannot be read"):
            read_members(tmp_path / "members.json")
