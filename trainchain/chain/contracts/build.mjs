// Compiles the contracts beside this file into artifacts/. With --check it writes nothing and fails on a difference.
// With --analyse DIR it writes sources and syntax trees there, laid out as Slither reads a Hardhat project.
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const here = dirname(fileURLToPath(import.meta.url));
const require = createRequire(import.meta.url);
const solc = require("solc");
// The escrow is compiled through the IR, which makes its calls cheaper. A token's bytes never change without need:
// the one that a chain has is known by them.
const viaIR = { TrainEscrow: true, TrainToken: false };
const names = Object.keys(viaIR);

// No metadata hash in the bytecode, so that the same source gives the same bytes on every machine.
const settings = {
  optimizer: { enabled: true, runs: 10000 },
  evmVersion: "cancun",
  metadata: { bytecodeHash: "none" },
};
const outputs = ["abi", "evm.bytecode.object", "evm.deployedBytecode.object", "evm.deployedBytecode.immutableReferences"];

const sources = {};
const read = (path) => readFileSync(path, "utf8").replace(/\r\n/g, "\n");
for (const name of names) sources[`${name}.sol`] = { content: read(join(here, `${name}.sol`)) };

// Every file that went into a contract counts for its source hash, the libraries' too.
const imported = {};
const findImport = (path) => {
  try {
    imported[path] = read(require.resolve(path));
    return { contents: imported[path] };
  } catch {
    return { error: `${path} was not found; run npm install` };
  }
};

const settingsOf = (name) => (viaIR[name] ? { ...settings, viaIR: true } : settings);
const compile = (name) => {
  const file = `${name}.sol`;
  const input = {
    language: "Solidity",
    sources: { [file]: sources[file] },
    settings: { ...settingsOf(name), outputSelection: { "*": { "*": outputs } } },
  };
  const output = JSON.parse(solc.compile(JSON.stringify(input), { import: findImport }));
  // A library's own warnings are not ours to mend.
  const problems = (output.errors ?? []).filter(
    (problem) => problem.severity === "error" || problem.sourceLocation?.file === file,
  );
  for (const problem of problems) console.error(problem.formattedMessage);
  if (problems.length > 0) process.exit(1);
  return output.contracts[file][name];
};
const compiled = Object.fromEntries(names.map((name) => [name, compile(name)]));

// The library moves tokens in assembly, where Slither sees no call, and so no door that was left open.
const plainly = `// SPDX-License-Identifier: MIT
pragma solidity ^0.8.20;
import {IERC20} from "../IERC20.sol";
library SafeERC20 {
    function safeTransfer(IERC20 token, address to, uint256 value) internal {
        require(token.transfer(to, value));
    }
    function safeTransferFrom(IERC20 token, address from, address to, uint256 value) internal {
        require(token.transferFrom(from, to, value));
    }
}
`;
const analyse = process.argv.indexOf("--analyse");
if (analyse > 0) {
  const folder = process.argv[analyse + 1];
  const maps = ["abi", "evm.bytecode", "evm.deployedBytecode"];
  const selection = { "*": { "": ["ast"], "*": maps } };
  sources["@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol"] = { content: plainly };
  const asked = { language: "Solidity", sources, settings: { ...settings, viaIR: true, outputSelection: selection } };
  const output = JSON.parse(solc.compile(JSON.stringify(asked), { import: findImport }));
  const put = (path, text) => {
    mkdirSync(dirname(join(folder, path)), { recursive: true });
    writeFileSync(join(folder, path), text);
  };
  put("hardhat.config.js", "");
  for (const [path, text] of Object.entries(imported)) put(path, text);
  for (const [path, { content }] of Object.entries(sources)) put(path, content);
  const version = solc.version().split("+")[0];
  put("artifacts/build-info/contracts.json", JSON.stringify({ solcVersion: version, input: asked, output }));
  process.exit(0);
}

const sha256 = (text) => createHash("sha256").update(text).digest("hex");
const libraries = Object.keys(imported).sort().map((path) => `${path}:${sha256(imported[path])}`);

let stale = 0;
for (const name of names) {
  const { abi, evm } = compiled[name];
  const own = sources[`${name}.sol`].content;
  // The ids of syntax tree nodes mean nothing outside one compilation; only the places do.
  const immutables = Object.values(evm.deployedBytecode.immutableReferences).flat();
  const artifact = {
    contract: name,
    solc: solc.version(),
    settings: settingsOf(name),
    sourceHash: sha256([`${name}.sol:${sha256(own)}`, ...libraries].join("\n")),
    immutableReferences: immutables.sort((a, b) => a.start - b.start),
    bytecode: `0x${evm.bytecode.object}`,
    deployedBytecode: `0x${evm.deployedBytecode.object}`,
    abi,
  };
  const path = join(here, "artifacts", `${name}.json`);
  const text = `${JSON.stringify(artifact, null, 1)}\n`;
  if (process.argv.includes("--check")) {
    const found = existsSync(path) ? JSON.parse(read(path)) : {};
    const keys = Object.keys(artifact).filter((key) => JSON.stringify(found[key]) !== JSON.stringify(artifact[key]));
    if (keys.length > 0) {
      console.error(`artifacts/${name}.json differs from its source in: ${keys.join(", ")}. Run node build.mjs.`);
      stale = 1;
    }
  } else {
    mkdirSync(dirname(path), { recursive: true });
    writeFileSync(path, text);
  }
  console.log(`${name}: ${evm.deployedBytecode.object.length / 2} bytes of code`);
}
process.exit(stale);
