// Streams one chat from a Tandem server: node dist/chat.js HOST:PORT QUESTION
import { Code, ConnectError, createClient } from "@connectrpc/connect";
import { createGrpcTransport } from "@connectrpc/connect-node";

import { FinishReason, InferenceService } from "./tandem/v1/inference_pb.js";

async function chat(address: string, question: string, signal: AbortSignal): Promise<void> {
  const client = createClient(InferenceService, createGrpcTransport({ baseUrl: `http://${address}` }));
  const request = {
    prompt: { chat: { messages: [{ role: "user", content: question }] } },
    sampling: { temperature: 0 },
    stopping: { maxTokens: 128 },
  };
  for await (const message of client.generateStream(request, { signal })) {
    process.stdout.write(message.textDelta);
    if (message.finish) console.error(`\n[${FinishReason[message.finish.reason]}]`);
  }
}

const [address, question] = process.argv.slice(2);
if (!address || !question) {
  console.error("usage: node dist/chat.js HOST:PORT QUESTION");
  process.exit(2);
}
const interrupt = new AbortController();
process.once("SIGINT", () => interrupt.abort());
try {
  await chat(address, question, interrupt.signal);
} catch (thrown) {
  const error = ConnectError.from(thrown);
  console.error(`${Code[error.code]}: ${error.rawMessage}`);
  process.exitCode = error.code === Code.Canceled ? 130 : 1;
}
