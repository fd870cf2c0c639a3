// The command of OpenAI Codex: it works in a shell (each of its model calls is a stream), and answers in a schema.
import { spawnSync } from "node:child_process";
import { mkdirSync, readFileSync, writeFileSync } from "node:fs";
import * as parts from "./parts.mjs";

const schema = {
  type: "object",
  properties: { thought: { type: "string" }, name: { type: "string" }, people: { type: "integer" } },
  required: ["thought", "name", "people"],
  additionalProperties: false,
};

function codex(prompt, ...more) {
  mkdirSync("/tmp/codex", { recursive: true });
  const address = `openai_base_url=${process.env.OPENAI_BASE_URL}`;
  // Codex cannot create its own sandbox inside Belay's, which contains it already.
  const open = "--dangerously-bypass-approvals-and-sandbox";
  // The provider would make this search, and Belay denies it.
  const alone = "web_search=disabled";
  const args = ["node_modules/@openai/codex/bin/codex.js", "exec", "--skip-git-repo-check", open, "-C", "/tmp", "-c", address, "-c", alone];
  const env = { ...process.env, CODEX_HOME: "/tmp/codex", CODEX_API_KEY: process.env.OPENAI_API_KEY };
  const ran = spawnSync(process.execPath, [...args, "-m", process.env.MODEL, "-o", "/tmp/last", ...more, prompt], { env, timeout: 100000, input: "" });
  console.log(`${ran.stdout}\n${ran.stderr}`);
  parts.holds(ran.status === 0, `exit code 0, found ${ran.status}`);
  return readFileSync("/tmp/last", "utf8");
}

await parts.main({
  tools() {
    parts.ended(codex("[tools] Run `echo made by hand > /tmp/note.txt`, then `cat /tmp/note.txt`."));
    parts.holds(readFileSync("/tmp/note.txt", "utf8") === "made by hand\n", "the note");
  },
  streaming() {
    parts.ended(codex("[streaming] Say hello."));
  },
  structured() {
    writeFileSync("/tmp/schema.json", JSON.stringify(schema));
    const found = JSON.parse(codex(parts.STRUCTURED, "--output-schema", "/tmp/schema.json"));
    parts.holds(found.name === "Tokyo", JSON.stringify(found));
  },
});
