"""Faults of one place that the harness must notice. Each breaks a promise for some request at some moment."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """In `file`, where `old` occurs once, `new` takes its place. The short form of `part` must notice it."""

    file: str
    """The path below the folder that is on Python's path, such as tandem_worker/startup.py"""
    old: str
    new: str
    part: str


CHANGES: dict[tuple[str, str], tuple[tuple[str, str], ...]] = {
    ("simulation", "tandem_scheduler/core/scheduler.py"): (
        ("                sequence.num_outstanding -= 1", "                sequence.num_outstanding -= 2"),
        (
            "            if token_id in sequence.stop_token_ids:",
            "            if token_id in sequence.stop_token_ids and len(sequence.token_ids) % 2:",
        ),
        (
            "            if len(sequence.token_ids) + 1 == sequence.max_len:",
            "            if len(sequence.token_ids) + 2 == sequence.max_len:",
        ),
        (
            "                outputs.finished.append(self._finish(sequence, FinishReason.LENGTH))",
            "                self._finish(sequence, FinishReason.LENGTH)",
        ),
    ),
    ("simulation", "tandem_scheduler/core/block_manager.py"): (
        (
            "                if self._registered[block_id] is None:\n                    self._free.append(block_id)",
            "                if self._registered[block_id] is None:\n                    pass",
        ),
        ("        return sum(self._num_references[hit.block_id] == 0 for hit in hits)", "        return 0"),
        ("            self._num_references[hit.block_id] += 1", "            self._num_references[hit.block_id] = 1"),
    ),
    ("simulation", "tandem_scheduler/core/residency.py"): (
        ("        num_computed = min(num_cached, num_tokens - 1)", "        num_computed = num_cached"),
        ("        self.removed_rows.append(sequence.row)", "        pass"),
        (
            "        if self._enable_prefix_caching and not sequence.lacks_prompt_logprobs:",
            "        if self._enable_prefix_caching:",
        ),
        ("            lists=sequence.request.lists,\n", ""),
        (
            "            if self.rows.next_position[sequence.row] >= num_tokens:",
            "            if self.rows.next_position[sequence.row] >= num_tokens - 1:",
        ),
        (
            "        num_blocks = -(-(sequence.max_len - 1) // size)",
            "        num_blocks = (sequence.max_len - 1) // size",
        ),
    ),
    ("simulation", "tandem_scheduler/core/logprob_reports.py"): (
        ("    first = sequence.num_computed_tokens + 1\n", "    first = sequence.num_computed_tokens\n"),
        (
            "        taken.append((sequence.sequence_id, _without_first(report, num_known)))",
            "        taken.append((sequence.sequence_id, report))",
        ),
        ("        sequence.next_reported_position = end\n", ""),
        ("        if sequence.is_finished or end", "        if end"),
    ),
    ("simulation", "tandem_scheduler/core/row_faults.py"): (
        (
            '        return f"{error} at output token {sequence.num_output_tokens + 1}", field',
            '        return f"{error} at output token {sequence.num_output_tokens + 1}", None',
        ),
    ),
    ("simulation", "tandem_scheduler/core/rows.py"): (
        (
            "        self.last_position[row] = sequence.max_len - 2",
            "        self.last_position[row] = sequence.max_len - 1",
        ),
        ("        self.is_decoding[row] = False", "        pass"),
    ),
    ("simulation", "tandem_scheduler/core/suspects.py"): (
        ("MAX_FAILED_TRIALS = 2", "MAX_FAILED_TRIALS = 1"),
        ("        return sequence.is_suspect and not self.has_result and not self.is_probed", "        return False"),
    ),
    ("simulation", "tandem_scheduler/core/waiting_queue.py"): (
        ("        if self.num_new + len(lengths) > most:", "        if self.num_new + len(lengths) >= most:"),
    ),
    ("simulation", "tandem_scheduler/engine/step_loop.py"): (
        (
            "            silent_s = time.monotonic() - max(oldest.made_at, session.heard_at)",
            "            silent_s = time.monotonic() - oldest.made_at",
        ),
        ("            if silent_s > self._step_timeout_s:", "            if silent_s > 10 * self._step_timeout_s:"),
        (
            "                if may_give_up and time.monotonic() >= deadline:",
            "                if may_give_up and time.monotonic() >= deadline - 5:",
        ),
        ("            self._has_given_up = False\n            self.is_connected", "            self.is_connected"),
    ),
    ("simulation", "tandem_scheduler/engine/hub.py"): (
        (
            "            pending.token_handles.append(sequence.handle)",
            "            pending.token_handles.append(sequence.sequence_id)",
        ),
        (
            "        if sequence is not None and self._sequences.get(sequence.sequence_id) is sequence:",
            "        if sequence is not None:",
        ),
        (
            "            attachment.close_request(first_handle)",
            "            self.close_request(attachment, first_handle) if first_handle % 2 else None",
        ),
        (
            "        for attachment in self._attachments:\n            attachment.flush()",
            "        for attachment in self._attachments[:1]:\n            attachment.flush()",
        ),
    ),
    ("simulation", "tandem_scheduler/engine/conversions.py"): (
        (
            "    num_prompt_logprobs = sampling.num_prompt_logprobs if index == 0 else None",
            "    num_prompt_logprobs = sampling.num_prompt_logprobs",
        ),
    ),
    ("simulation", "tandem_scheduler/engine_interface.py"): (
        ("        return fail_outputs(listener, batch.handles)", "        return []"),
        ("        self.logprobs += later.logprobs", "        self.logprobs = later.logprobs"),
        ("        self.prompt_logprobs += later.prompt_logprobs", "        pass"),
        (
            "[*self.token_handles, *reported, *(end.handle for end in self.ends)]",
            "self.token_handles",
        ),
    ),
    ("simulation", "tandem_scheduler/processes/engine_codec.py"): (
        ("        start, requested_start = end, requested_end", "        start = end"),
        ("    if first.lists:\n        encode_lists(first.lists, message.lists)\n", ""),
    ),
    ("simulation", "tandem_scheduler/front_end/front_end.py"): (
        (
            "                self.engine.stop(handle, choice.num_output_tokens)",
            "                self.engine.stop(handle, choice.num_output_tokens + 1)",
        ),
        ("        live.num_running -= 1", "        live.num_running -= 2"),
        (
            "        except BaseException:\n            self.close(live)",
            "        except BaseException:\n            pass",
        ),
        (
            "        ended_by_token = {end.handle for end in batch.ends if end.stop_token_id is not None}",
            "        ended_by_token: set[int] = set()",
        ),
    ),
    ("simulation", "tandem_scheduler/front_end/text/detokenizer.py"): (
        ("if self._num_tokens <= self._num_passed_over:", "if self._num_tokens < self._num_passed_over:"),
        ("(0 if self._includes_stop else len(stop))", "len(stop)"),
    ),
    ("simulation", "tandem_scheduler/front_end/prompt_reports.py"): (
        ("        self._next_position += len(logprobs)\n", "        self._next_position += max_tokens\n"),
    ),
    ("simulation", "tandem_scheduler/front_end/logprob_buffer.py"): (
        ("        self._ranks.append(report.rank)", "        self._ranks.append(1)"),
        (
            "        self._ranks.frombytes(report.ranks.tobytes())",
            "        self._ranks.frombytes(report.ranks[::-1].tobytes())",
        ),
    ),
    ("simulation", "tandem_scheduler/front_end/live_request.py"): (
        ("                del self.token_ids[position + 1 :]", "                del self.token_ids[position + 2 :]"),
        ("        self._num_decoded = max(0, self._num_decoded - len(token_ids))", "        self._num_decoded = 0"),
        (
            "self.reason = end.reason if self._detokenizer.matched_stop is None else FinishReason.STOP",
            "self.reason = end.reason",
        ),
        ("            num_open -= delta.end is not None", "            num_open -= 1"),
    ),
    ("kills", "tandem_scheduler/engine/step_loop.py"): (
        (
            "            self._sink.on_outputs(outputs)\n",
            "            outputs.step_id % 50 == 7 or self._sink.on_outputs(outputs)\n",
        ),
        ("self._tell_finished(self.scheduler.lose_worker(failure))", "self.scheduler.lose_worker(failure)"),
        ("failure = reason = str(error)", "reason = str(error)"),
    ),
    ("kills", "tandem_scheduler/core/scheduler.py"): (
        ("self._in_flight = StepsInFlight()", "self._in_flight = getattr(self, '_in_flight', StepsInFlight())"),
    ),
    ("kills", "tandem_scheduler/core/suspects.py"): (("if count < (MAX_FAILED", "if count <= (MAX_FAILED"),),
    ("kills", "tandem_worker/service/session.py"): (
        (
            "            self._news.put_nowait(result)",
            "            self._num_answered % 40 == 7 or self._news.put_nowait(result)",
        ),
    ),
    ("kills", "tandem_worker/runners/batch.py"): (
        (
            "self.is_present[plan.removed_rows] = False\n        for new",
            "self.is_present[plan.removed_rows[1:]] = False\n        for new",
        ),
    ),
    ("kills", "tandem_worker/runners/logits_stage.py"): (
        ("np.split(new.token_ids, [new.num_prompt_tokens])", "np.split(new.token_ids, [len(new.token_ids)])"),
    ),
    ("kills", "tandem_worker/runners/grammar_rows.py"): (
        (
            "            ready=self._compiling.submit(self._prepare, grammar.text, read),",
            "            ready=self._compiling.submit(self._prepare, grammar.text, []),",
        ),
    ),
    ("messages", "tandem_scheduler/front_end/grammar_check.py"): (
        (
            "        except GrammarError as error:\n            violations",
            "        except KeyError as error:\n            violations",
        ),
    ),
    ("kills", "tandem_shared/host/supervisor.py"): (
        ("if self._is_stopping or status == 0:", "if self._is_stopping or status <= 0:"),
    ),
    ("silence", "tandem_shared/rpc/grpc_options.py"): (
        ('("grpc.http2.ping_timeout_ms", timeout_ms)', '("grpc.http2.ping_timeout_ms", 10 * timeout_ms)'),
    ),
    ("silence", "tandem_scheduler/engine/step_loop.py"): (
        ("await self._sink.on_readiness(False)", "await self._sink.on_readiness(True)"),
        ("        self._meter.start_session()\n        self._has_news.set()", "        self._meter.start_session()"),
    ),
    ("silence", "tandem_worker/service/servicer.py"): (("self._runner.reset()", "pass"),),
    ("silence", "tandem_worker/service/session.py"): (("            self._plans.put(None)\n", "            pass\n"),),
    ("restarts", "tandem_scheduler/service.py"): (("timeout=grace_s", "timeout=0.0"),),
    ("restarts", "tandem_scheduler/engine/hub.py"): (
        (
            "        idle = asyncio.create_task(self._is_idle.wait())",
            "        idle = asyncio.create_task(asyncio.sleep(0))",
        ),
        ("        if not self._num_open:", "        if self._num_open:"),
    ),
    ("restarts", "tandem_scheduler/processes/engine_side/engine_servicer.py"): (
        ("        for outbox in self._outboxes:\n            outbox.close()", "        pass"),
    ),
    ("restarts", "tandem_shared/host/supervisor.py"): (
        ("signal.SIGKILL if self._is_stopping else signal.SIGTERM", "signal.SIGKILL"),
    ),
    ("restarts", "tandem_shared/rpc/server.py"): (
        ("(self.second if self.first.is_set() else self.first).set()", "self.second.set()"),
    ),
    ("messages", "tandem_scheduler/front_end/validation.py"): (
        ("    _check_sampling(first.sampling, violations)\n", ""),
        ("in problems(first.lists, worker.vocab_size) if worker is not None else ():", "in ():"),
    ),
    ("messages", "tandem_scheduler/front_end/list_checks.py"): (
        ("is_length = 1 <= len(text) <= longest", "is_length = len(text) <= longest"),
    ),
    ("messages", "tandem_scheduler/front_end/grpc_api/vllm_engine_codec.py"): (
        ("    except TooManyFields:", "    except KeyError:"),
    ),
    ("messages", "tandem_scheduler/front_end/grpc_api/vllm_engine_servicer.py"): (
        ("            except RequestNotFound:", "            except KeyError:"),
    ),
    ("messages", "tandem_scheduler/front_end/chat/rendering.py"): (
        ("    except (ValueError, RecursionError) as error:", "    except ZeroDivisionError as error:"),
    ),
    ("kills", "tandem_scheduler/front_end/chat/chat_renderer.py"): (
        ("        for _ in range(2):\n            try:", "        for _ in range(1):\n            try:"),
    ),
    ("messages", "tandem_shared/rpc/wire_fields.py"): (("    raise TooManyFields", "    raise IndexError"),),
    ("messages", "tandem_shared/rpc/error_interceptor.py"): (("except DecodeError:", "except KeyError:"),),
    ("messages", "tandem_worker/service/servicer.py"): (
        ("(old.has_plans or not request.num_live_sequences)", "not request.num_live_sequences"),
        ('UnexpectedMessage("a session is opened', 'RuntimeError("a session is opened'),
    ),
    ("messages", "tandem_worker/runners/batch.py"): (("_require(not wrong,", "_require(len(wrong) < 2,"),),
    ("messages", "tandem_shared/sampling_fields.py"): (
        ("top_p: float = _declare(1.0, ABOVE_ZERO, 1,", "top_p: float = _declare(1.0, 0, 1,"),
        ("temperature: float = _declare(1.0, 0, FLOAT32_MAX,", "temperature: float = _declare(1.0, 0, math.inf,"),
    ),
    ("overload", "tandem_scheduler/core/waiting_queue.py"): (
        ("if self.num_new + len(lengths) > most:", "if self.num_new + len(lengths) > most + 8:"),
        (
            "self.num_new_tokens + sum(lengths) > self._max_num_new_tokens",
            "self.num_new_tokens > self._max_num_new_tokens",
        ),
        ("        self.num_new -= 1\n", "        self.num_new -= 0\n"),
    ),
    ("overload", "tandem_scheduler/engine/hub.py"): (
        ("pending.token_ids.append(token_id)", "pending.token_ids.append(token_id ^ 1)"),
    ),
    ("overload", "tandem_scheduler/front_end/live_request.py"): (
        ("self._num_taken += len(token_ids)", "self._num_taken += 1"),
    ),
    ("overload", "tandem_scheduler/front_end/front_end.py"): (
        (
            "if live.is_streaming:\n                live.has_news.set()",
            "if False:\n                live.has_news.set()",
        ),
    ),
    ("overload", "tandem_shared/rpc/call_gate.py"): (
        ("            self._num_open -= 1\n", "            self._num_open -= 0\n"),
    ),
    ("admission", "tandem_scheduler/core/waiting_queue.py"): (
        ("self._deadlines[0][0] <= now:", "self._deadlines[0][0] <= now - 0.1:"),
    ),
    ("admission", "tandem_scheduler/engine/step_loop.py"): (
        ("if expired := self.scheduler.expire(time.monotonic()):", "if expired := []:"),
    ),
    ("admission", "tandem_scheduler/front_end/grpc_api/request_codec.py"): (
        ("return None if left_s is None else time.monotonic() + left_s", "return None"),
    ),
    ("admission", "tandem_scheduler/engine/hub.py"): (
        ("        self._num_open -= 1\n", "        self._num_open -= 0\n"),
    ),
    ("admission", "tandem_scheduler/front_end/front_end.py"): (
        ("self.engine.close_request(live.first_handle, live.outcome(time.monotonic()))", "pass"),
    ),
    ("folders", "tandem_worker/checkpoint/weights.py"): (
        ("        if not is_name or len(name) > MAX_NAME_CHARACTERS:", "        if not isinstance(name, str):"),
        ("        if tuple(shape) != target.shape:\n            raise", "        if False:\n            raise"),
    ),
    ("folders", "tandem_shared/model_folder.py"): (
        ("    if len(contents) > MAX_JSON_BYTES:", "    if not contents:"),
        ("    except RecursionError:", "    except ZeroDivisionError:"),
    ),
    ("drops", "tandem_shared/rpc/grpc_options.py"): (
        ("WORKER_KEEPALIVE_TIME_MS = 2_000", "WORKER_KEEPALIVE_TIME_MS = 20_000"),
    ),
    ("drops", "tandem_worker/service/servicer.py"): (
        ("if request.session_epoch <= old.epoch:", "if request.session_epoch >= old.epoch:"),
    ),
}
"""Pairs of old and new text, by the part that must notice them and the file."""

MUTATIONS: tuple[Mutation, ...] = tuple(
    Mutation(file, old, new, part) for (part, file), changes in CHANGES.items() for old, new in changes
)
