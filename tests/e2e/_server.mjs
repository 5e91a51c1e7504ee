// A server for the tests: the one that INGOT_URL names, or one started from INGOT_BIN.

import { spawn } from "node:child_process";
import { createServer } from "node:net";

const START_MS = 120_000;

function freePort() {
  return new Promise((resolve, reject) => {
    const probe = createServer();
    probe.on("error", reject);
    probe.listen(0, "127.0.0.1", () => {
      const { port } = probe.address();
      probe.close(() => resolve(port));
    });
  });
}

/** The base URL, a model's name and the API key of a server that is ready. */
export async function findOrStart() {
  const { INGOT_URL, INGOT_MODEL, INGOT_BIN, INGOT_TEST_MODEL, INGOT_TEST_DATA } = process.env;
  let key = process.env.INGOT_API_KEY;
  let url = INGOT_URL;
  let child;
  if (!url) {
    key = "sk-end-to-end";
    const port = await freePort();
    url = `http://127.0.0.1:${port}`;
    const command = ["serve", INGOT_TEST_MODEL ?? "smollm2:135m", "--port", `${port}`, "--api-key", key];
    if (INGOT_TEST_DATA) command.push("--data-dir", INGOT_TEST_DATA);
    child = spawn(INGOT_BIN, command, { stdio: "inherit" });
    process.on("exit", () => child.kill());
  }
  url = url.replace(/\/+$/, "");
  if (!child && INGOT_MODEL) return { url, model: INGOT_MODEL, key };
  const end = Date.now() + START_MS;
  while (Date.now() < end) {
    if (child && child.exitCode !== null) throw new Error(`the server ended: ${child.exitCode}`);
    try {
      if ((await fetch(`${url}/ready`)).ok) {
        const headers = { authorization: `Bearer ${key}` };
        const list = await (await fetch(`${url}/v1/models`, { headers })).json();
        return { url, model: INGOT_MODEL ?? list.data[0].id, key };
      }
    } catch {
      // Not listening yet.
    }
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  throw new Error("the server is not ready");
}
