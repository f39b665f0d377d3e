// Claims a leaf with ethers and reads the escrow's reasons for refusing two more claims. Asked on stdin, told on stdout.
import { readFileSync } from "node:fs";
import { Contract, JsonRpcProvider, NonceManager, Wallet } from "ethers";

const asked = JSON.parse(readFileSync(0, "utf8"));
const provider = new JsonRpcProvider(asked.rpc, undefined, { polling: true, pollingInterval: 50, cacheTimeout: -1 });
const escrow = new Contract(asked.escrow, asked.abi, new NonceManager(new Wallet(asked.key, provider)));

const receipt = await (await escrow.claim(asked.jobId, asked.account, asked.cumulative, asked.proof)).wait();
const claimed = receipt.logs.map((log) => escrow.interface.parseLog(log)).find((log) => log?.name === "Claimed");

const told = (error) => ({ name: error.name, values: error.args.toObject() });
const refusals = [];
try {
  // As anybody would look before they leap: ethers knows the reason by the ABI.
  await escrow.claim.staticCall(asked.jobId, asked.account, asked.cumulative, asked.proof);
} catch (problem) {
  refusals.push(told(problem.revert));
}
try {
  // What is sent fails while its gas is estimated, and brings the reason's bytes.
  await escrow.claim(asked.jobId, asked.account, asked.wrong, asked.proof);
} catch (problem) {
  refusals.push(told(escrow.interface.parseError(problem.data)));
}
const answer = { tx: receipt.hash, paid: claimed.args.toObject(), refusals };
console.log(JSON.stringify(answer, (_, value) => (typeof value === "bigint" ? value.toString() : value)));
provider.destroy();
