"""What the injector asks and tells the API server about pods: a namespace's annotations, and Events.

Called by `injector.app`; `injector.webhook` knows these only by their protocols.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.k8s.api import Api, object_path
from core.k8s.errors import ApiError, NotFound
from core.k8s.events import About, EventRecorder
from injector.decide import Refuse, Skip
from injector.webhook import NamespaceUnknown


class ApiNamespaces:
    """Asks for each pod: a memory, however fresh, would let pods that are applied together with their namespace start outside the mesh.

    It costs a read of one small object for each pod that is created, of an API server that must be there for pods to be created at all.
    """

    def __init__(self, api: Api) -> None:
        self._api = api

    async def annotations(self, namespace: str) -> Mapping[str, str]:
        """Raises NamespaceUnknown."""
        try:
            found = await self._api.get(object_path("", "v1", "namespaces", "", namespace))
        except NotFound:
            return {}  # it is being deleted: the API server refuses the pod itself
        except ApiError as error:
            raise NamespaceUnknown(f"namespace {namespace}: {error.message}") from error
        return {str(key): str(value) for key, value in ((found.get("metadata") or {}).get("annotations") or {}).items()}


class EventTeller:
    """Events about whoever made the pod (a ReplicaSet, a Job), else about the pod."""

    def __init__(self, recorder: EventRecorder) -> None:
        self._recorder = recorder

    def tell(self, pod: Mapping[str, Any], namespace: str, decision: Skip | Refuse) -> None:
        """Never raises."""
        about = regarding(pod, namespace)
        if isinstance(decision, Refuse):
            self._recorder.record(about, "Warning", "InjectionRefused", "Inject", decision.sentence)
        else:
            self._recorder.record(about, "Normal", "InjectionSkipped", "Inject", decision.sentence)


def regarding(pod: Mapping[str, Any], namespace: str) -> About:
    """Whom an Event about this pod is for; any shape will do."""
    metadata = pod.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    owners = metadata.get("ownerReferences")
    for owner in owners if isinstance(owners, list) else []:
        if isinstance(owner, dict) and owner.get("controller") is True:
            texts = [str(owner.get(name) or "")[:253] for name in ("kind", "name", "uid", "apiVersion")]
            return About(texts[0], namespace, texts[1], texts[2], texts[3])
    name = str(metadata.get("name") or str(metadata.get("generateName") or "").rstrip("-"))[:253]
    return About("Pod", namespace, name)
