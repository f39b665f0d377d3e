// Claims a leaf with viem and reads the escrow's reasons for refusing two more claims. Asked on stdin, told on stdout.
import { readFileSync } from "node:fs";
import { ContractFunctionRevertedError, createPublicClient, createWalletClient, http, parseEventLogs } from "viem";
import { privateKeyToAccount } from "viem/accounts";

const asked = JSON.parse(readFileSync(0, "utf8"));
const transport = http(asked.rpc);
const account = privateKeyToAccount(asked.key);
const reader = createPublicClient({ transport, pollingInterval: 50, cacheTime: 0 });
const wallet = createWalletClient({ account, transport });
const leaf = (cumulative) => ({
  address: asked.escrow,
  abi: asked.abi,
  functionName: "claim",
  args: [asked.jobId, asked.account, BigInt(cumulative), asked.proof],
  account,
  chain: null,
});

const hash = await wallet.writeContract(leaf(asked.cumulative));
const receipt = await reader.waitForTransactionReceipt({ hash });
const [claimed] = parseEventLogs({ abi: asked.abi, logs: receipt.logs, eventName: "Claimed" });

const refusals = [];
for (const [call, cumulative] of [
  [reader.simulateContract, asked.cumulative],
  [reader.estimateContractGas, asked.wrong],
]) {
  try {
    await call(leaf(cumulative));
  } catch (problem) {
    const { data } = problem.walk((cause) => cause instanceof ContractFunctionRevertedError);
    const inputs = data.abiItem.inputs;
    refusals.push({
      name: data.errorName,
      values: Object.fromEntries(inputs.map(({ name }, place) => [name, data.args[place]])),
    });
  }
}
const answer = { tx: hash, paid: claimed.args, refusals };
console.log(JSON.stringify(answer, (_, value) => (typeof value === "bigint" ? value.toString() : value)));
