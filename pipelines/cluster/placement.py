"""Where on a cluster tasks run that reserve no CPU, which Ray would put on any node."""


def off_idle_nodes() -> dict[str, str] | None:
    """A label selector for all nodes but those that have no CPU now, such as a head that is to do no work; None where
    each has some."""
    import ray

    idle = [node["NodeID"] for node in ray.nodes() if node["Alive"] and not node["Resources"].get("CPU")]
    return {"ray.io/node-id": f"!in({','.join(idle)})"} if idle else None
