"""What a replica tells about its work: stage timings, profiler traces, kernel calls, log levels."""
