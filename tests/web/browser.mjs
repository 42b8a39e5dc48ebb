// node browser.mjs REQUEST.json ANSWER.json: serves the page on loopback and opens it in Chromium.
import { createReadStream, existsSync } from "node:fs";
import { mkdtemp, readFile, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { tmpdir } from "node:os";
import path from "node:path";

const [request, answer] = process.argv.slice(2);
const asked = JSON.parse(await readFile(request, "utf8"));
const { chromium } = createRequire(asked.modules)("playwright-core");
const types = { ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript",
                ".wasm": "application/wasm", ".json": "application/json" };

function fileOf(url) {
  if (url === "/") return asked.page;
  if (url === "/ask.json") return request;
  const [start, folder] = Object.entries(asked.folders).find(([prefix]) => url.startsWith(prefix)) ?? [];
  return start && path.join(folder, path.normalize(url.slice(start.length)));
}

const server = createServer((call, reply) => {
  const file = fileOf(new URL(call.url, "http://x").pathname);
  if (!file || !existsSync(file)) return reply.writeHead(404).end();
  reply.writeHead(200, { "content-type": types[path.extname(file)] ?? "application/octet-stream" });
  createReadStream(file).pipe(reply);
});
await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));

const browser = await chromium.launchPersistentContext(await mkdtemp(path.join(tmpdir(), "web-")), {
  executablePath: asked.chromium,
  args: ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"],
});
const page = await browser.newPage();
const told = { console: [], requests: [] };
page.on("console", (message) => message.type() === "error" && told.console.push(message.text()));
page.on("pageerror", (error) => told.console.push(String(error)));
page.on("request", (sent) => !sent.url().startsWith("data:") && !sent.url().startsWith("blob:")
  && told.requests.push(sent.url()));
await page.goto(`http://127.0.0.1:${server.address().port}/`);
await page.waitForFunction("window.tokens", null, { timeout: 240000 }).catch((error) => told.console.push(String(error)));
told.tokens = await page.evaluate("window.tokens");
await page.screenshot({ path: asked.screenshot });
await browser.close();
server.close();
await writeFile(answer, JSON.stringify(told));
