"""What a user may say of a compute of the kind ``kubernetes``."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, field

from flame.runners.secret import Secret

Patience = Annotated[float, Meta(ge=0)]
Quantity = str | int | float


class PodResources(msgspec.Struct, kw_only=True, frozen=True, rename="camel", forbid_unknown_fields=True):
    """What each worker asks of its node (``requests``) and is held to (``limits``), in Kubernetes' own words."""

    requests: dict[str, Quantity] = field(default_factory=dict)
    limits: dict[str, Quantity] = field(default_factory=dict)


class KubernetesConfig(msgspec.Struct, kw_only=True, frozen=True, rename="camel", forbid_unknown_fields=True):
    """Configuration of the kind ``kubernetes``.

    :ivar kubeconfig: a file that says where the cluster is and who we are. None: ``KUBECONFIG`` or ``~/.kube/config``; a server that
        runs in a pod itself takes that pod's service account.
    :ivar credentials: the text of such a file, where the server has none.
    :ivar context: which of the file's contexts; None for its current one.
    :ivar namespace: where pods are made; None: the context's, or the server's own pod's.
    :ivar image: what workers run; Flame must be installed in it.
    :ivar image_pull_policy: when it is pulled.
    :ivar image_pull_secrets: names of secrets in the namespace, with which it is pulled.
    :ivar service_account: of the pods. Their code gets no token of it, unless ``podTemplate`` says so.
    :ivar resources: of each worker, where its job says nothing of its own.
    :ivar gpu_resource: the name by which the cluster knows GPUs.
    :ivar node_selector: labels that a node must have.
    :ivar tolerations: as in a pod's spec.
    :ivar labels: for every pod, beside Flame's own. Likewise ``annotations``.
    :ivar environment: variables for every worker.
    :ivar pod_template: whatever else of a pod (``metadata`` and ``spec``), laid over what Flame makes. The worker's container is
        called ``worker``; lists of things with names are merged by name, other lists replaced.
    :ivar room_patience: seconds that a pod may wait for a node with room; None for ever.
    :ivar pull_patience: seconds for which an image that cannot be pulled is tried again.
    :ivar start_patience: seconds from the node to the running container; long enough to pull the image.
    :ivar keep_ended: seconds for which the pod of a worker that failed is kept to be looked at.
    """

    kubeconfig: str | None = None
    credentials: Secret | None = None
    context: str | None = None
    namespace: str | None = None
    image: str = "flame"
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    image_pull_secrets: list[str] = field(default_factory=list)
    service_account: str | None = None
    resources: PodResources = field(default_factory=PodResources)
    gpu_resource: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = field(default_factory=dict)
    tolerations: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    pod_template: dict[str, Any] = field(default_factory=dict)
    room_patience: Patience | None = 300.0
    pull_patience: Patience = 5.0
    start_patience: Patience = 600.0
    keep_ended: Patience = 600.0
