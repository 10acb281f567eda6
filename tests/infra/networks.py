"""Who may reach whom, by NetworkPolicies: as networking.k8s.io/v1 defines it."""

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

Policy = Mapping[str, Any]


def matches(selector: Mapping[str, Any], labels: Mapping[str, str]) -> bool:
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for wanted in selector.get("matchExpressions", []):
        assert wanted["operator"] == "In", "the only one that is used"
        if labels.get(wanted["key"]) not in wanted["values"]:
            return False
    return True


def _rule_allows(rule: Mapping[str, Any], key: str, other: Mapping[str, Any], port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    if ports is not None and not any(one["port"] == port and one.get("protocol", "TCP") == protocol for one in ports):
        return False
    peers = rule.get(key)
    return peers is None or any(_is_peer(peer, other) for peer in peers)


def _is_peer(peer: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if "ipBlock" in peer:
        if "address" not in other:
            return False
        address, block = ipaddress.ip_address(other["address"]), peer["ipBlock"]
        inside = address in ipaddress.ip_network(block["cidr"])
        return inside and not any(address in ipaddress.ip_network(net) for net in block.get("except", []))
    if "address" in other:
        return False
    here = "namespaceSelector" not in peer
    of_namespace = (
        other.get("namespace", {}) == {} if here else matches(peer["namespaceSelector"], other.get("namespace", {}))
    )
    return of_namespace and matches(peer.get("podSelector", {}), other["labels"])


def _side(policies: Sequence[Policy], kind: str, key: str, pod: Any, other: Any, port: int, protocol: str) -> bool:
    ours = [
        p["spec"]
        for p in policies
        if kind in p["spec"]["policyTypes"] and matches(p["spec"]["podSelector"], pod["labels"])
    ]
    if not ours:
        return True  # nobody speaks of this pod: Kubernetes lets everything through
    return any(_rule_allows(rule, key, other, port, protocol) for p in ours for rule in p.get(kind.lower(), []))


def reaches(policies: Sequence[Policy], source: Any, target: Any, port: int, protocol: str = "TCP") -> bool:
    """A pod here is {"labels": ...}; of another namespace it has "namespace", its labels; what is outside an "address"."""
    out = (
        True
        if "namespace" in source or "address" in source
        else _side(policies, "Egress", "to", source, target, port, protocol)
    )
    into = (
        True
        if "namespace" in target or "address" in target
        else _side(policies, "Ingress", "from", target, source, port, protocol)
    )
    return out and into
