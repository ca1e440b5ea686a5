"""Faults of one place that the harness must notice. Each changes what is promised, for some request at some moment."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """`old`, which stands once in the file, becomes `new`. part: whose short form notices it."""

    file: str
    old: str
    new: str
    part: str


MUTATIONS: tuple[Mutation, ...] = (
    Mutation(
        "scheduler_service/core/scheduler.py",
        "                sequence.num_outstanding -= 1",
        "                sequence.num_outstanding -= 2",
        "simulation",
    ),
    Mutation(
        "scheduler_service/core/scheduler.py",
        "            if token_id in sequence.stop_token_ids:",
        "            if token_id in sequence.stop_token_ids and len(sequence.token_ids) % 2:",
        "simulation",
    ),
    Mutation(
        "scheduler_service/core/scheduler.py",
        "            if len(sequence.token_ids) + 1 == sequence.max_len:",
        "            if len(sequence.token_ids) + 2 == sequence.max_len:",
        "simulation",
    ),
    Mutation(
        "scheduler_service/core/scheduler.py",
        "                outputs.finished.append(self._finish(sequence, FinishReason.LENGTH))",
        "                self._finish(sequence, FinishReason.LENGTH)",
        "simulation",
    ),
    Mutation(
        "scheduler_service/core/block_manager.py",
        "                if self._registered[block_id] is None:\n                    self._free.append(block_id)",
        "                if self._registered[block_id] is None:\n                    pass",
        "simulation",
    ),
    Mutation(
        "scheduler_service/core/block_manager.py",
        "        return sum(self._num_references[hit.block_id] == 0 for hit in hits)",
        "        return 0",
        "simulation",
    ),
    Mutation(
        "scheduler_service/core/block_manager.py",
        "            self._num_references[hit.block_id] += 1",
        "            self._num_references[hit.block_id] = 1",
        "simulation",
    ),
    Mutation(
        "scheduler_service/core/residency.py",
        "        num_computed = min(num_cached, num_tokens - 1)",
        "        num_computed = num_cached",
        "simulation",
    ),
    Mutation(
        "scheduler_service/core/residency.py",
        "        self.removed_rows.append(sequence.row)",
        "        pass",
        "simulation",
    ),
    Mutation(
        "scheduler_service/core/residency.py",
        "            if self.rows.next_position[sequence.row] >= num_tokens:",
        "            if self.rows.next_position[sequence.row] >= num_tokens - 1:",
        "simulation",
    ),
    Mutation(
        "scheduler_service/core/residency.py",
        "        num_blocks = -(-(sequence.max_len - 1) // size)",
        "        num_blocks = (sequence.max_len - 1) // size",
        "simulation",
    ),
    Mutation(
        "scheduler_service/core/rows.py",
        "        self.last_position[row] = sequence.max_len - 2",
        "        self.last_position[row] = sequence.max_len - 1",
        "simulation",
    ),
    Mutation("scheduler_service/core/rows.py", "        self.is_decoding[row] = False", "        pass", "simulation"),
    Mutation("scheduler_service/core/suspects.py", "MAX_FAILED_TRIALS = 2", "MAX_FAILED_TRIALS = 1", "simulation"),
    Mutation(
        "scheduler_service/core/suspects.py",
        "        return sequence.is_suspect and not self.has_result and not self.is_probed",
        "        return False",
        "simulation",
    ),
    Mutation(
        "scheduler_service/core/waiting_queue.py",
        "        if self.num_new + len(lengths) > most:",
        "        if self.num_new + len(lengths) >= most:",
        "simulation",
    ),
    Mutation(
        "scheduler_service/step_loop.py",
        "            silent_s = time.monotonic() - max(oldest.at, session.heard_at)",
        "            silent_s = time.monotonic() - oldest.at",
        "simulation",
    ),
    Mutation(
        "scheduler_service/step_loop.py",
        "            if silent_s > self._step_timeout_s:",
        "            if silent_s > 10 * self._step_timeout_s:",
        "simulation",
    ),
    Mutation(
        "scheduler_service/step_loop.py",
        "                if may_give_up and time.monotonic() >= deadline:",
        "                if may_give_up and time.monotonic() >= deadline - 5:",
        "simulation",
    ),
    Mutation(
        "scheduler_service/step_loop.py",
        "            self._has_given_up = False\n            self.is_connected",
        "            self.is_connected",
        "simulation",
    ),
    Mutation(
        "scheduler_service/engine_hub.py",
        "            pending.token_handles.append(sequence.handle)",
        "            pending.token_handles.append(sequence.sequence_id)",
        "simulation",
    ),
    Mutation(
        "scheduler_service/engine_hub.py",
        "        if sequence is not None and self._sequences.get(sequence.sequence_id) is sequence:",
        "        if sequence is not None:",
        "simulation",
    ),
    Mutation(
        "scheduler_service/engine_hub.py",
        "            attachment.close_request(first_handle)",
        "            self.close_request(attachment, first_handle) if first_handle % 2 else None",
        "simulation",
    ),
    Mutation(
        "scheduler_service/engine_hub.py",
        "        for attachment in self._attachments:\n            attachment.flush()",
        "        for attachment in self._attachments[:1]:\n            attachment.flush()",
        "simulation",
    ),
    Mutation(
        "scheduler_service/engine.py",
        "        return fail_outputs(listener, batch.handles)",
        "        return []",
        "simulation",
    ),
    Mutation(
        "scheduler_service/engine.py",
        "        self.logprobs += later.logprobs",
        "        self.logprobs = later.logprobs",
        "simulation",
    ),
    Mutation(
        "scheduler_service/engine.py",
        "return [*self.token_handles, *(handle for handle, _ in self.logprobs), *(end.handle for end in self.ends)]",
        "return self.token_handles",
        "simulation",
    ),
    Mutation(
        "scheduler_service/front_end.py",
        "                self.engine.stop(handle, choice.num_output_tokens)",
        "                self.engine.stop(handle, choice.num_output_tokens + 1)",
        "simulation",
    ),
    Mutation(
        "scheduler_service/front_end.py", "        live.num_running -= 1", "        live.num_running -= 2", "simulation"
    ),
    Mutation(
        "scheduler_service/front_end.py",
        "        except BaseException:\n            self.close(live)",
        "        except BaseException:\n            pass",
        "simulation",
    ),
    Mutation(
        "scheduler_service/front_end.py",
        "        ended_by_token = {end.handle for end in batch.ends if end.stop_token_id is not None}",
        "        ended_by_token: set[int] = set()",
        "simulation",
    ),
    Mutation(
        "scheduler_service/live_request.py",
        "                del self.token_ids[position + 1 :]",
        "                del self.token_ids[position + 2 :]",
        "simulation",
    ),
    Mutation(
        "scheduler_service/live_request.py",
        "        self._num_decoded = max(0, self._num_decoded - len(token_ids))",
        "        self._num_decoded = 0",
        "simulation",
    ),
    Mutation(
        "scheduler_service/live_request.py",
        "        reason = end.reason if stop_string is None else FinishReason.STOP",
        "        reason = end.reason",
        "simulation",
    ),
    Mutation(
        "scheduler_service/live_request.py",
        "            num_open -= delta.end is not None",
        "            num_open -= 1",
        "simulation",
    ),
    Mutation(
        "scheduler_service/step_loop.py",
        "            self._sink.on_outputs(outputs)\n",
        "            outputs.step_id % 50 == 7 or self._sink.on_outputs(outputs)\n",
        "kills",
    ),
    Mutation(
        "scheduler_service/step_loop.py",
        "self._tell_finished(self.scheduler.lose_worker(failure))",
        "self.scheduler.lose_worker(failure)",
        "kills",
    ),
    Mutation("scheduler_service/step_loop.py", "failure = str(error)", 'failure = ""', "kills"),
    Mutation(
        "scheduler_service/core/scheduler.py",
        "self._in_flight: deque[_StepInFlight] = deque()",
        "self._in_flight: deque[_StepInFlight] = getattr(self, '_in_flight', deque())",
        "kills",
    ),
    Mutation("scheduler_service/core/suspects.py", "if count < (MAX_FAILED", "if count <= (MAX_FAILED", "kills"),
    Mutation(
        "worker_service/session.py",
        "            self._news.put_nowait(result)",
        "            self._num_answered % 40 == 7 or self._news.put_nowait(result)",
        "kills",
    ),
    Mutation(
        "worker_service/batch.py",
        "self.is_present[plan.removed_rows] = False\n        for new",
        "self.is_present[plan.removed_rows[1:]] = False\n        for new",
        "kills",
    ),
    Mutation(
        "shared/supervisor.py", "if self._is_stopping or status == 0:", "if self._is_stopping or status <= 0:", "kills"
    ),
    Mutation(
        "shared/grpc_options.py",
        '("grpc.http2.ping_timeout_ms", timeout_ms)',
        '("grpc.http2.ping_timeout_ms", 10 * timeout_ms)',
        "silence",
    ),
    Mutation(
        "scheduler_service/step_loop.py",
        "await self._sink.on_readiness(False)",
        "await self._sink.on_readiness(True)",
        "silence",
    ),
    Mutation(
        "scheduler_service/step_loop.py",
        "        self._result_at = 0.0\n        self._has_news.set()",
        "        self._result_at = 0.0",
        "silence",
    ),
    Mutation("worker_service/servicer.py", "self._runner.reset()", "pass", "silence"),
    Mutation("worker_service/session.py", "            self._plans.put(None)\n", "            pass\n", "silence"),
    Mutation("scheduler_service/service.py", "timeout=grace_s", "timeout=0.0", "restarts"),
    Mutation(
        "scheduler_service/engine_hub.py",
        "        await self._is_idle.wait()",
        "        await asyncio.sleep(0)",
        "restarts",
    ),
    Mutation(
        "scheduler_service/engine_hub.py", "        if not self._num_open:", "        if self._num_open:", "restarts"
    ),
    Mutation(
        "scheduler_service/engine_servicer.py",
        "        for outbox in self._outboxes:\n            outbox.close()",
        "        pass",
        "restarts",
    ),
    Mutation(
        "shared/supervisor.py", "signal.SIGKILL if self._is_stopping else signal.SIGTERM", "signal.SIGKILL", "restarts"
    ),
    Mutation(
        "shared/server.py",
        "(self.second if self.first.is_set() else self.first).set()",
        "self.second.set()",
        "restarts",
    ),
    Mutation(
        "scheduler_service/validation.py",
        "violations.check(0 < top_p <= 1,",
        "violations.check(0 <= top_p <= 1,",
        "messages",
    ),
    Mutation(
        "scheduler_service/validation.py",
        "0 <= token_id < worker.vocab_size",
        "0 <= token_id <= worker.vocab_size",
        "messages",
    ),
    Mutation("scheduler_service/validation.py", "    _check_sampling(first.sampling, violations)\n", "", "messages"),
    Mutation("shared/wire_fields.py", "    raise TooManyFields", "    raise IndexError", "messages"),
    Mutation("shared/error_interceptor.py", "except DecodeError:", "except KeyError:", "messages"),
    Mutation(
        "worker_service/servicer.py",
        "(old.has_plans or not request.num_live_sequences)",
        "not request.num_live_sequences",
        "messages",
    ),
    Mutation(
        "worker_service/servicer.py",
        'UnexpectedMessage("a session is opened',
        'RuntimeError("a session is opened',
        "messages",
    ),
    Mutation("worker_service/batch.py", "0 <= sampling.temperature < np.inf", "0 <= sampling.temperature", "messages"),
    Mutation(
        "scheduler_service/core/waiting_queue.py",
        "if self.num_new + len(lengths) > most:",
        "if self.num_new + len(lengths) > most + 8:",
        "overload",
    ),
    Mutation(
        "scheduler_service/core/waiting_queue.py",
        "self.num_new_tokens + sum(lengths) > self._max_num_new_tokens",
        "self.num_new_tokens > self._max_num_new_tokens",
        "overload",
    ),
    Mutation(
        "scheduler_service/core/waiting_queue.py",
        "        self.num_new -= 1\n",
        "        self.num_new -= 0\n",
        "overload",
    ),
    Mutation(
        "scheduler_service/engine_hub.py",
        "pending.token_ids.append(token_id)",
        "pending.token_ids.append(token_id ^ 1)",
        "overload",
    ),
    Mutation(
        "scheduler_service/live_request.py", "self._num_taken += len(token_ids)", "self._num_taken += 1", "overload"
    ),
    Mutation(
        "scheduler_service/front_end.py",
        "if live.is_streaming:\n                live.has_news.set()",
        "if False:\n                live.has_news.set()",
        "overload",
    ),
    Mutation(
        "shared/call_gate.py", "            self._num_open -= 1\n", "            self._num_open -= 0\n", "overload"
    ),
    Mutation(
        "scheduler_service/core/waiting_queue.py",
        "self._deadlines[0][0] <= now:",
        "self._deadlines[0][0] <= now - 0.1:",
        "admission",
    ),
    Mutation(
        "scheduler_service/step_loop.py",
        "if expired := self.scheduler.expire(time.monotonic()):",
        "if expired := []:",
        "admission",
    ),
    Mutation(
        "scheduler_service/servicer.py",
        "return None if left_s is None else time.monotonic() + left_s",
        "return None",
        "admission",
    ),
    Mutation(
        "scheduler_service/engine_hub.py", "        self._num_open -= 1\n", "        self._num_open -= 0\n", "admission"
    ),
    Mutation("scheduler_service/front_end.py", "self.engine.close_request(live.first_handle)", "pass", "admission"),
    Mutation(
        "worker_service/weights.py",
        "        if not is_name or len(name) > MAX_NAME_CHARACTERS:",
        "        if not isinstance(name, str):",
        "folders",
    ),
    Mutation(
        "worker_service/weights.py",
        "        if tuple(shape) != target.shape:\n            raise",
        "        if False:\n            raise",
        "folders",
    ),
    Mutation("worker_service/config_file.py", "    except RecursionError:", "    except ZeroDivisionError:", "folders"),
    Mutation("shared/model_folder.py", "    if len(contents) > MAX_JSON_BYTES:", "    if not contents:", "folders"),
    Mutation(
        "shared/grpc_options.py", "WORKER_KEEPALIVE_TIME_MS = 2_000", "WORKER_KEEPALIVE_TIME_MS = 20_000", "drops"
    ),
    Mutation(
        "worker_service/servicer.py",
        "if request.session_epoch <= old.epoch:",
        "if request.session_epoch >= old.epoch:",
        "drops",
    ),
)
