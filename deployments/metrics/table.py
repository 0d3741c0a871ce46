"""All metrics of the application, with their labels: nothing else declares one."""

from __future__ import annotations

from deployments.metrics.metric import Area, Label, Metric

SHORT_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
LONG_S = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
BYTES = (1e4, 1e5, 1e6, 1e7, 1e8, 1e9)
SIZES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)

ROUTE = Label("as `/docs` shows it; `unrouted`: refused before, or there is none", at_most=64)
STATUS = Label("of HTTP; `none`: the caller hung up before an answer", at_most=24)
ANSWERED = Label("the class of the status", ("2xx", "3xx", "4xx", "5xx", "hung_up"))
KEY = Label("12 digits of the SHA-256 of the API key's label; `none`: no keys are asked for", at_most=100)
MODEL = Label("the name that callers use", at_most=64)
KIND = Label("of media", ("image", "video", "audio", "tensors"))
QUEUE = Label("what callers wait for and what runs; or that and the jobs that wait", ("callers", "all"))
STAGE = Label("of the pipeline", ("encoder", "denoiser", "vae"))
PROCESS = Label("the stages of the process, such as `denoiser` or `encoder+vae`", at_most=8)
COMPONENT = Label("of the pipeline, such as `transformer`", at_most=8)
TIER = Label("where it is, or where it was loaded to", ("device", "host"))
FORMAT = Label("of the file", ("png", "jpeg", "webp", "gif", "mp4", "wav", "flac", "mp3", "safetensors"))
JOB_ENDED = Label("how it ended", ("completed", "failed", "cancelled"))
WEBHOOK = Label(
    "`refused`: forbidden, or 410; `given_up`: after the last try", ("taken", "refused", "failed", "given_up")
)


def counter(name: str, help: str, /, **labels: Label) -> Metric:
    return Metric(name, "counter", help, labels)


def gauge(name: str, help: str, /, **labels: Label) -> Metric:
    return Metric(name, "gauge", help, labels)


def histogram(name: str, buckets: tuple[float, ...], help: str, /, **labels: Label) -> Metric:
    return Metric(name, "histogram", help, labels, buckets)


AREAS = {
    "requests": Area("Requests", "ingress", (
        counter("triptych_requests_total", "HTTP requests that were answered.",
                route=ROUTE, outcome=ANSWERED, status=STATUS),
        histogram("triptych_request_seconds", LONG_S, "From the arrival of an HTTP request to the end of its answer.",
                  route=ROUTE, outcome=ANSWERED),
        gauge("triptych_requests_open", "HTTP requests that are being answered."),
        counter("triptych_requests_refused_total", "Requests and jobs that there was no room for.",
                reason=Label("which bound, in `admission` and `jobs` but for the numbers at once", (
                    "queue", "key_share", "pending", "requests_at_once", "bodies_at_once", "job_queue",
                    "job_key_share", "jobs", "too_long"))),
    )),
    "keys": Area("API keys", "ingress", (
        counter("triptych_key_requests_total", "HTTP requests of an API key that were answered.",
                key=KEY, outcome=ANSWERED),
        counter("triptych_key_compute_seconds_total", "Seconds that devices worked for an API key alone.", key=KEY),
        counter("triptych_key_made_total", "Requests of the pipeline that were made for an API key.", key=KEY),
    )),
    "queue": Area("What waits", "ingress", (
        gauge("triptych_pending", "What was let in and is not done: requests of the pipeline.", model=MODEL,
              who=Label("a caller waits, a job runs, a job waits", ("callers", "running_jobs", "waiting_jobs"))),
        gauge("triptych_queue_seconds", "Predicted seconds until what was let in is done.",
              model=MODEL, queue=QUEUE),
        gauge("triptych_queue_limit_seconds", "The bound of triptych_queue_seconds.", model=MODEL, queue=QUEUE),
    )),
    "making": Area("Making", "ingress", (
        counter("triptych_attempts_total", "Ways through the stages that were begun."),
        counter("triptych_recoveries_total", "Requests that went on after the death of a replica."),
        counter("triptych_lost_steps_total", "Denoising steps done again after the death of a replica."),
        counter("triptych_given_up_total", "Requests failed because their replicas died again and again."),
        counter("triptych_begun_again_total", "Requests that began again from the start.",
                start=Label("without a checkpoint of no use, with the complete hand-off, with remote calls",
                            ("checkpoint", "complete", "remote"))),
        counter("triptych_replica_refusals_total", "Times that a replica would not begin with a request."),
        counter("triptych_memory_waits_total", "Times that a request waited for the memory of a device."),
        counter("triptych_shared_total", "Requests that got what another, equal one was having made."),
        counter("triptych_made_total", "Requests of the pipeline that were made.", model=MODEL, kind=KIND),
    )),
    "model": Area("The models", "ingress", (
        gauge("triptych_model_info", "1 for each model that is served.", model=MODEL),
        counter("triptych_model_requests_total", "HTTP requests for something of a model that were answered.",
                model=MODEL, outcome=ANSWERED),
        gauge("triptych_model_asleep", "1 while the model has given its accelerators back, or is being woken, else 0.",
              model=MODEL),
        counter("triptych_model_wakes_total", "Times that a request woke the model.", model=MODEL),
        gauge("triptych_model_load_seconds",
              "Seconds until a model that slept could serve; before the first time, its slowest replica's start.",
              model=MODEL),
        gauge("triptych_stages_wanted",
              "1 for each deployment of a stage that requests go through, 0 while its model sleeps.",
              target=Label("the name of the deployment, such as `Denoiser` or `Denoiser-flux`", at_most=192)),
    )),
    "jobs": Area("Jobs", "ingress", (
        gauge("triptych_jobs", "Jobs in the job store, of the whole application.",
              status=Label("of jobs", ("queued", "in_progress", "completed", "failed", "cancelled"))),
        counter("triptych_jobs_taken_total", "Jobs that were taken on.", model=MODEL, kind=KIND),
        counter("triptych_jobs_ended_total", "Jobs that ended here.", model=MODEL, outcome=JOB_ENDED),
        histogram("triptych_job_seconds", LONG_S, "From the taking of a job to its end.", outcome=JOB_ENDED),
        histogram("triptych_job_wait_seconds", LONG_S, "From the taking of a job to its begin, told at its end."),
        counter("triptych_job_takeovers_total", "Claims of jobs that a runner had died with."),
        gauge("triptych_job_store_up", "1 where the job store answered when it was last asked, else 0."),
        counter("triptych_webhooks_total", "Deliveries of webhooks.", outcome=WEBHOOK),
        histogram("triptych_webhook_seconds", SHORT_S, "Seconds of a delivery.", outcome=WEBHOOK),
    )),
    "storage": Area("Storage", "ingress", (
        histogram("triptych_storage_seconds", SHORT_S, "Seconds of a call to the storage.",
                  operation=Label("what was asked", ("check", "store", "load", "delete")),
                  outcome=Label("`missing`: no such object; `error`: it refused; `away`: no answer",
                                ("ok", "missing", "error", "away"))),
        counter("triptych_stored_bytes_total", "Bytes that the storage took.",
                way=Label("at once, or from the spool", ("direct", "spool"))),
        gauge("triptych_storage_circuit_open", "1 while the storage is asked only from time to time, else 0."),
        counter("triptych_spooled_total", "Outputs that the storage did not take, kept in this machine's spool."),
        gauge("triptych_spool_entries", "Entries of this machine's spool.",
              entry=Label("to be uploaded, to be deleted, or set aside as damaged", ("upload", "delete", "set_aside"))),
        gauge("triptych_spool_bytes", "Bytes in this machine's spool, but for those set aside."),
        gauge("triptych_spool_oldest_seconds", "Since the last try with the entry that waits longest for one."),
    )),
    "stages": Area("Stages", "replicas of the stages", (
        gauge("triptych_stage_replicas", "1 while the replica passes its health checks, else 0.", stage=STAGE),
        gauge("triptych_stage_present", "Requests in a replica.",
              stage=STAGE, state=Label("for its turn, or in work", ("waiting", "working"))),
        histogram("triptych_stage_queue_seconds", SHORT_S, "Seconds that a request waited for its turn.", stage=STAGE),
        histogram("triptych_stage_seconds", SHORT_S, "Seconds of work on a request; the denoiser's are shared.",
                  stage=STAGE),
        counter("triptych_stage_requests_total", "Requests that a stage was done with.",
                stage=STAGE, outcome=Label("how it ended", ("ok", "error", "cancelled"))),
        counter("triptych_stage_busy_seconds_total", "Seconds with at least one request in work.", stage=STAGE),
        counter("triptych_stage_bytes_total", "Bytes that stages gave each other, and of media.",
                stage=STAGE, direction=Label("into the stage, out of it", ("in", "out"))),
    )),
    "engine": Area("Step engine", "replicas with a denoiser", (
        counter("triptych_steps_total", "Steps of schedulers."),
        histogram("triptych_batch_size", SIZES, "Forwards that one turn of the device ran.", component=COMPONENT),
        counter("triptych_forwards_total", "Forwards of denoisers.",
                component=COMPONENT, merged=Label("with others in a batch", ("true", "false")),
                outcome=Label("how it ended", ("ok", "error"))),
        counter("triptych_passes_together_total", "Forwards in a batch with others of their own request.",
                component=COMPONENT),
        counter("triptych_merges_refused_total", "Structures of forwards that are never merged: batches deviated.",
                component=COMPONENT),
        histogram("triptych_step_seconds", SHORT_S, "Seconds of one turn of the device.",
                  component=COMPONENT, size=Label("forwards of the turn", at_most=64)),
        counter("triptych_device_seconds_total", "Seconds of the device in forwards of denoisers.",
                component=COMPONENT),
        histogram("triptych_step_queue_seconds", SHORT_S, "Seconds that a forward waited for the device.",
                  component=COMPONENT),
        gauge("triptych_engine_busy_share", "Share of the last minute in which the device made forwards.",
              stage=PROCESS),
        counter("triptych_cancels_total", "Requests that were cancelled here."),
        counter("triptych_cached_steps_total", "Steps under Cache-DiT.",
                component=COMPONENT, kind=Label("computed, or skipped by the cache", ("computed", "reused"))),
        histogram("triptych_checkpoint_bytes", BYTES, "Bytes of a checkpoint."),
        histogram("triptych_checkpoint_seconds", SHORT_S, "Seconds to make a checkpoint."),
        counter("triptych_checkpoints_made_bytes_total", "Bytes of all checkpoints that were made."),
        counter("triptych_resumes_total", "Requests that went on here from a checkpoint."),
    )),
    "adapters": Area("LoRAs", "replicas of the stages", (
        gauge("triptych_adapters", "LoRAs in memory.", stage=PROCESS, tier=TIER),
        gauge("triptych_adapter_bytes", "Bytes of LoRAs in memory.", stage=PROCESS, tier=TIER),
        counter("triptych_adapter_lookups_total", "LoRAs that were asked for, and those that had to go.",
                stage=PROCESS, tier=TIER, event=Label("what was found", ("hits", "misses", "evictions"))),
        histogram("triptych_adapter_load_seconds", SHORT_S, "Seconds that loading a LoRA took.",
                  stage=PROCESS, tier=TIER),
    )),
    "device": Area("Devices", "replicas of the stages", (
        gauge("triptych_device_memory_bytes", "Bytes of the device, as torch's allocator counts them; none of CPUs.",
              stage=PROCESS, kind=Label("by tensors, with what the allocator keeps, most at one time since the start",
                                        ("allocated", "reserved", "peak"))),
        counter("triptych_out_of_memory_total", "Times that the device had less memory than was asked for.",
                stage=PROCESS),
    )),
    "media": Area("Files of media", "replicas with a VAE", (
        histogram("triptych_media_seconds", SHORT_S, "Seconds to write a file, with the wait for a worker.",
                  format=FORMAT),
        counter("triptych_media_bytes_total", "Bytes of the files that were written.", format=FORMAT),
        gauge("triptych_media_workers", "Processes that write files.",
              state=Label("whether they have one to write", ("idle", "busy"))),
        counter("triptych_media_worker_deaths_total", "Processes that died over a file, and were replaced."),
    )),
}  # fmt: skip

METRICS = {metric.name: metric for area in AREAS.values() for metric in area.metrics}
OF_THE_INGRESS = tuple(name for name, area in AREAS.items() if area.told_by == "ingress")
