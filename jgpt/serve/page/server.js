"use strict";
// The server: its own OpenAI-compatible API, asked with the settings of the page.

function headers() {
  const token = at("token").value.trim();
  return { "Content-Type": "application/json", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
}

function rules() {
  return Object.fromEntries(RULES.filter((id) => at(id).value !== "").map((id) => [id, Number(at(id).value)]));
}

class ServerError extends Error {
  constructor(error, status) {
    super(status === 401 ? T.need_token : error.message);
    this.code = error.code;
  }
}

// Ask for a streamed answer; `onPiece(text)` gets it. Returns {end, usage}.
async function ask(path, body, onPiece, signal) {
  const request = { ...rules(), ...body, stream: true, stream_options: { include_usage: true } };
  const options = { method: "POST", headers: headers(), body: JSON.stringify(request), signal };
  const response = await fetch(path, options);
  if (!response.ok) {
    const answer = await response.json().catch(() => ({ error: { message: `HTTP ${response.status}` } }));
    throw new ServerError(answer.error, response.status);
  }
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", end = "", usage = null;
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return { end, usage };
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const part = JSON.parse(event.slice(6));
      if (part.error) throw new ServerError(part.error, 500);
      if (part.jgpt) notice(part.jgpt.note);
      usage = part.usage ?? usage;
      const choice = part.choices[0];
      if (!choice) continue;
      end = choice.finish_reason ?? end;
      onPiece(choice.delta ? choice.delta.content ?? "" : choice.text);
    }
  }
}
