// Runs Slither over the contracts beside this file and fails where it finds other than slither.json lists. The triage of
// what is listed: docs/security.md. With --write the list is made anew. SLITHER names the program.
import { spawnSync } from "node:child_process";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const list = join(here, "slither.json");
const folder = mkdtempSync(join(tmpdir(), "slither-"));
const run = (command, ...args) => spawnSync(command, args, { cwd: folder, encoding: "utf8" });

const built = run(process.execPath, join(here, "build.mjs"), "--analyse", folder);
const options = ["--ignore-compile", "--npx-disable", "--filter-paths", "@openzeppelin", "--json", "found.json"];
const slither = process.env.SLITHER || "slither";
const said = built.status === 0 ? run(slither, ".", ...options) : built;
let told = { success: false };
try {
  told = JSON.parse(readFileSync(join(folder, "found.json"), "utf8"));
} catch {
  // It never came so far; what it said says why.
}
rmSync(folder, { recursive: true });
if (!told.success) {
  console.error(`Slither did not run: ${said.error?.message ?? said.stderr}`);
  process.exit(2);
}

const found = (told.results.detectors ?? []).map(({ check, elements }) => `${check}: ${elements[0].name}`).sort();
if (process.argv.includes("--write")) writeFileSync(list, `${JSON.stringify(found, null, 1)}\n`);
const known = JSON.parse(readFileSync(list, "utf8"));
const fresh = found.filter((one) => !known.includes(one));
const gone = known.filter((one) => !found.includes(one));
for (const one of fresh) console.error(`not triaged: ${one}`);
for (const one of gone) console.error(`listed, but not found: ${one}`);
console.log(`${found.length} findings, ${known.length} listed`);
process.exit(fresh.length + gone.length > 0 ? 1 : 0);
