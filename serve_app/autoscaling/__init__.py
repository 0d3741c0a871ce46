"""The policy that a Serve config file may name: the replicas of all stages together, by the work that each has.

    autoscaling_policy:
      policy_function: serve_app.autoscaling:ReplicaRatio
      policy_kwargs: {target_queue_s: 15}

Serve's own policy looks at each deployment alone and counts requests. This one reckons in seconds of work, as the
replicas report them (`StageReplica.record_autoscaling_stats`), and when more requests come to one stage it also
gives the stages behind it what these requests will need there. See docs/autoscaling.md.

Serve sends this folder by value to its controller, which may not have the project: it imports only what Ray brings.
"""

from serve_app.autoscaling.policy import ReplicaRatio, model_of

__all__ = ["ReplicaRatio", "model_of"]
