// Asks the server for the next answer of a conversation and follows it into a message.

import { stream } from "./api.js";

const SAMPLING = ["temperature", "top_p", "top_k", "min_p", "repetition_penalty", "max_tokens", "seed"];

// What is sent: earlier thoughts are left out, files stand before the text they came with.
export function request(conversation, options) {
  const messages = conversation.messages
    .filter((one) => one.role === "user" || one.content)
    .map((one) => ({ role: one.role, content: withFiles(one) }));
  if (conversation.system) messages.unshift({ role: "system", content: conversation.system });
  const body = { messages, model: options.model, stream_options: { include_usage: true } };
  for (const name of SAMPLING) if (options[name] !== undefined) body[name] = options[name];
  if (options.thinks) {
    body.chat_template_kwargs = { enable_thinking: options.think };
    if (options.think && options.thinking_budget !== undefined) body.thinking_budget = options.thinking_budget;
  }
  return body;
}

function withFiles(message) {
  const parts = (message.files ?? []).map(({ name, text }) => `File ${name}:\n\n${text}\n\n`);
  return parts.join("") + message.content;
}

// Fills `message` while the answer comes; `changed` is called after every piece.
export async function follow(body, message, signal, changed) {
  const clock = new Clock();
  message.numbers = {};
  try {
    await stream(body, signal, (chunk) => {
      take(chunk, message, clock);
      changed();
    });
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    message.numbers.end = "stopped";
  }
}

function take(chunk, message, clock) {
  const delta = chunk.choices?.[0]?.delta ?? {};
  const reasoning = delta.reasoning_content ?? "";
  const content = delta.content ?? "";
  if (reasoning || content) clock.tick();
  if (content && message.reasoning && !message.content) message.numbers.thoughtSeconds = clock.since();
  message.reasoning = (message.reasoning ?? "") + reasoning;
  message.content += content;
  for (const call of delta.tool_calls ?? []) {
    message.content += call.function?.name ? `\n\`${call.function.name}\` ` : "";
    message.content += call.function?.arguments ?? "";
  }
  const end = chunk.choices?.[0]?.finish_reason;
  if (end) message.numbers.end = end;
  Object.assign(message.numbers, clock.numbers());
  if (chunk.usage) {
    message.numbers.tokens = chunk.usage.completion_tokens;
    message.numbers.context = chunk.usage.total_tokens;
    message.numbers.perSecond = clock.rate(chunk.usage.completion_tokens);
  }
}

class Clock {
  constructor() {
    this.start = performance.now();
    this.pieces = 0;
  }
  tick() {
    this.last = performance.now();
    this.first ??= this.last;
    this.pieces += 1;
  }
  since() {
    return (this.last - this.first) / 1000;
  }
  // Until the server has counted, a piece is taken for a token.
  rate(tokens = this.pieces) {
    return this.last > this.first ? (tokens - 1) / this.since() : undefined;
  }
  numbers() {
    return { tokens: this.pieces, perSecond: this.rate(), firstSeconds: this.first && (this.first - this.start) / 1000 };
  }
}
