// Streams one chat through OpenAI's API with its own client: node chat.mjs BASE_URL QUESTION
import OpenAI from "openai";

async function chat(baseURL, question, signal) {
  const client = new OpenAI({ baseURL, apiKey: process.env.OPENAI_API_KEY ?? "none" });
  const [model] = (await client.models.list({ signal })).data;
  const request = {
    model: model.id,
    messages: [{ role: "user", content: question }],
    temperature: 0,
    max_tokens: 128,
    stream: true,
  };
  for await (const chunk of await client.chat.completions.create(request, { signal })) {
    const [choice] = chunk.choices;
    process.stdout.write(choice.delta.content ?? "");
    if (choice.finish_reason) console.error(`\n[${choice.finish_reason}]`);
  }
}

const [baseURL, question] = process.argv.slice(2);
if (!baseURL || !question) {
  console.error("usage: node chat.mjs BASE_URL QUESTION");
  process.exit(2);
}
const interrupt = new AbortController();
process.once("SIGINT", () => interrupt.abort());
try {
  await chat(baseURL, question, interrupt.signal);
} catch (error) {
  if (!(error instanceof OpenAI.APIError)) throw error;
  console.error(error.message);
  process.exitCode = 1;
}
if (interrupt.signal.aborted) process.exitCode = 130;
