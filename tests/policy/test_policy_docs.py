"""docs/policy.md is true: every manifest on it is understood as written, and every answer it promises is the sidecar's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import policy_lab as lab
import pytest

from core.k8s.manifests import read_manifests
from injector.probes import rewrite_probes
from policy import wire
from policy.authorize import BadTarget, Client, Denied, NoRoute, Permit, PortAuthorizer
from policy.index import Index
from policy.index.report import problems
from policy.model import ACCESS_POLICIES
from proxy.rescue import Cause, effect

CAUSES: dict[type, Cause] = {Denied: Cause.DENIED, NoRoute: Cause.NO_ROUTE, BadTarget: Cause.BAD_TARGET}
PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text(encoding="utf-8")


class Example(NamedTuple):
    """One YAML block, with the section it stands in and the table of answers after it: (who, asks, answer)."""

    section: str
    manifests: str
    answers: list[tuple[str, str, str]]


def examples() -> list[Example]:
    found = []
    for part in re.split(r"^#{2,3} ", PAGE, flags=re.MULTILINE)[1:]:
        section = part.partition("\n")[0]
        for block in re.finditer(
            r"```yaml\n(.*?)```\n\n\| who \| asks \| answer \|\n\|---\|---\|---\|\n((?:\|[^\n]*\n)+)", part, re.DOTALL
        ):
            rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in block[2].splitlines()]
            found.append(Example(section, block[1], [(who, asks, answer) for who, asks, answer in rows]))
    return found


EXAMPLES = examples()


def index_of(example: Example) -> Index:
    """The page's pod, unless the example has its own, and the example's objects."""
    raws = read_manifests(example.manifests.encode(), is_json=False)
    pods = [raw for raw in raws if raw["kind"] == "Pod"]
    return lab.indexed(*raws, *([] if pods else [lab.pod("cart")]))


def client(who: str) -> Client:
    name, _, ip = who.partition(" at ")
    namespace, slash, account = name.partition("/")
    identity = f"spiffe://cluster.local/ns/{namespace}/sa/{account}" if slash else None
    return Client(ip or "10.1.1.1", identity, "" if identity else "plaintext")


def answer(index: Index, who: str, asks: str) -> str:
    asked = re.fullmatch(r"(?:port (\d+) )?`(\S+)(?: (\S+))?`", asks)
    assert asked is not None, asks
    port = int(asked[1] or 8080)
    line = wire.encode(wire.PortPolicy(port, index.inbound_policy("shop", "cart", port)))
    message = wire.decode_to_sidecar_untrusted(line)
    assert isinstance(message, wire.PortPolicy)
    authorizer = PortAuthorizer(message.policy, "cluster.local").for_client(client(who))
    if asked[2] == "TCP":
        return "let in" if isinstance(authorizer.connection(), Permit) else "closed"
    decision = authorizer.request(asked[2].encode(), asked[3].encode(), b"cart.shop", ())
    return "let in" if isinstance(decision, Permit) else str(effect(CAUSES[type(decision)]).status)


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.section for example in EXAMPLES])
def test_an_example_gives_the_answers_of_its_table(example: Example) -> None:
    index = index_of(example)
    assert [(who, asks, answer(index, who, asks)) for who, asks, _ in example.answers] == example.answers


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.section for example in EXAMPLES])
def test_nothing_in_an_example_is_without_effect(example: Example) -> None:
    expected = ["overlap"] if "Overlapping" in example.section else []
    assert [problem.reason for problem in problems(index_of(example))] == expected


def test_every_difference_and_every_yaml_block_is_an_example() -> None:
    differences = re.findall(r"^### (\d\. .*)$", PAGE, re.MULTILINE)
    assert [section[0] for section in differences] == list("1234567")
    assert set(differences) <= {example.section for example in EXAMPLES}
    assert PAGE.count("```yaml") == len(EXAMPLES)


def test_the_links_of_the_comparison_lead_to_its_sections() -> None:
    headings = re.findall(r"^### (.*)$", PAGE, re.MULTILINE)
    anchors = {re.sub(r"[^a-z0-9 -]", "", heading.lower()).replace(" ", "-") for heading in headings}
    links = re.findall(r"\]\(#([^)]*)\)", PAGE)
    assert len(links) == 7 and set(links) <= anchors


def test_the_access_policies_of_the_page_are_those_of_the_model() -> None:
    table = PAGE.partition("| value | lets in |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([a-z-]+)`", table, re.MULTILINE)) == set(ACCESS_POLICIES)


def test_the_probe_of_the_page_is_asked_of_the_sidecar() -> None:
    example = next(example for example in EXAMPLES if "Probes" in example.section)
    (pod,) = read_manifests(example.manifests.encode(), is_json=False)
    (rewritten,) = rewrite_probes(pod)
    assert rewritten.probe["httpGet"]["port"] == 4191
    assert rewritten.original == {"httpGet": {"path": "/", "port": 8080}, "timeoutSeconds": 1}
