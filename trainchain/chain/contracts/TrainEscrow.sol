// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

import {IERC20} from "@openzeppelin/contracts/token/ERC20/IERC20.sol";
import {IERC20Permit} from "@openzeppelin/contracts/token/ERC20/extensions/IERC20Permit.sol";
import {SafeERC20} from "@openzeppelin/contracts/token/ERC20/utils/SafeERC20.sol";
import {EIP712} from "@openzeppelin/contracts/utils/cryptography/EIP712.sol";
import {MerkleProof} from "@openzeppelin/contracts/utils/cryptography/MerkleProof.sol";
import {SignatureChecker} from "@openzeppelin/contracts/utils/cryptography/SignatureChecker.sol";
import {ReentrancyGuardTransient} from "@openzeppelin/contracts/utils/ReentrancyGuardTransient.sol";
import {SafeCast} from "@openzeppelin/contracts/utils/math/SafeCast.sol";

/// @title Holds the budget of training jobs and pays workers what a job's hub settled.
/// @notice No admin, no proxy, no upgrade. Settled money can be claimed for ever. Amounts are cumulative per job and
/// account: a leaf, a voucher and `claimedOf` all speak of everything the account was ever owed or paid in that job.
///
/// Accounting, per job:
///   settled  = the last root's total + advances. Reserved for workers; the owner cannot have it back.
///   claimed  = everything paid out, by leaf or by voucher.
///   advances = what vouchers paid and no proven leaf has counted yet, summed over `Account.advanced`.
/// It always holds that claimed <= settled <= funded - refunded.
///
/// A voucher takes its money from funded - settled and raises `settled` and `claimed` alike, so settled - claimed,
/// which is what unclaimed leaves live on, does not change. When an account's leaf is proven, the part of its
/// advance that this leaf counts leaves `settled` again (it was reserved twice: in the total and as advance).
/// Anyone may prove it, by `claim` or `claimMany`, also where nothing is left to pay. No order of roots, claims
/// and vouchers can thus starve a leaf of a root whose leaves sum to its total and never fall, nor pay twice.
///
/// Any ERC-20 will do, but one that rebases: balances that change by themselves would be missing from some job, and
/// nothing here can see it; or that takes more from a sender than it was told to move. Of one that takes a fee from what
/// it moves, what arrives is what counts.
contract TrainEscrow is EIP712, ReentrancyGuardTransient {
    using SafeERC20 for IERC20;

    /// @notice The terms of a job; but for the hub and the deadline, they never change.
    /// @param token What the job pays in.
    /// @param hub Who settles, and signs vouchers.
    /// @param deadline Seconds since 1970. Until then the job can be funded.
    /// @param grace Seconds after the deadline for which settlements and vouchers are still taken, the last second
    /// included. The owner reclaims strictly after. A new hub, too, waits for so long before it takes over.
    /// @param activationDelay Seconds before a new root takes effect; at most `grace`, so that a last settlement
    /// always finds room before the window closes.
    /// @param roundCap The most by which one settlement may raise the total.
    /// @param specHash sha256 of the resolved recipe.
    /// @param salt Makes the job's id, with chain, contract and owner.
    struct JobParams {
        address token;
        address hub;
        uint48 deadline;
        uint32 grace;
        uint32 activationDelay;
        uint128 roundCap;
        bytes32 specHash;
        bytes32 salt;
    }

    /// @notice A job's terms and money. In `job()`'s answer, what is ripe shows as present.
    /// @param round The last settled round.
    /// @param pendingAt When `pendingRoot` takes the place of `root`; 0 where nothing is pending.
    /// @param nextHubAt When `nextHub` takes the place of `hub`; 0 where nobody was proposed.
    /// @param total The last root's total.
    struct Job {
        address owner;
        uint48 deadline;
        uint32 grace;
        bool halted;
        address hub;
        uint64 round;
        uint32 activationDelay;
        address token;
        uint48 pendingAt;
        uint48 nextHubAt;
        address nextHub;
        uint128 funded;
        uint128 refunded;
        uint128 settled;
        uint128 claimed;
        uint128 total;
        uint128 roundCap;
        bytes32 root;
        bytes32 pendingRoot;
        bytes32 specHash;
    }

    /// @param claimed Everything the account was paid in the job.
    /// @param advanced The part of it that vouchers paid and no proven leaf has counted yet.
    struct Account {
        uint128 claimed;
        uint128 advanced;
    }

    /// @notice One leaf of the root that is active now, for `claimMany`.
    /// @param cumulative What the leaf says: everything the account was ever owed in the job.
    struct ClaimItem {
        bytes32 jobId;
        address account;
        uint128 cumulative;
        bytes32[] proof;
    }

    /// @notice What an account signs to be paid elsewhere.
    /// @param tip What the sender of the transaction gets of the payment.
    /// @param validUntil The last second at which it counts.
    struct ClaimToParams {
        bytes32 jobId;
        address account;
        address to;
        uint128 cumulative;
        uint128 tip;
        uint48 validUntil;
    }

    bytes32 private constant SETTLEMENT_TYPEHASH =
        keccak256("Settlement(bytes32 jobId,uint64 round,bytes32 root,uint128 total,bytes32 dataHash)");
    bytes32 private constant VOUCHER_TYPEHASH = keccak256("Voucher(bytes32 jobId,address account,uint128 cumulative)");
    bytes32 private constant CLAIM_TO_TYPEHASH = keccak256(
        "ClaimTo(bytes32 jobId,address account,address to,uint128 cumulative,uint128 tip,uint48 validUntil)"
    );
    bytes32 private constant CLOSE_EARLY_TYPEHASH = keccak256("CloseEarly(bytes32 jobId)");

    /// What stands for no root, from creation on: a settlement that fills an empty slot would cost the hub four
    /// times as much. No proof leads to it.
    bytes32 private constant NO_ROOT = bytes32(uint256(1));

    /// The gas that a token gets in `claimMany`, so that one that burns all it is given cannot stop a batch.
    uint256 private constant TRANSFER_GAS = 500_000;

    mapping(bytes32 jobId => Job) private _jobs;
    mapping(bytes32 jobId => mapping(address account => Account)) private _accounts;

    /// @notice A job was opened with `amount` in it, as it arrived.
    event JobCreated(
        bytes32 indexed jobId,
        address indexed owner,
        address indexed token,
        address hub,
        uint128 amount,
        uint48 deadline,
        bytes32 specHash
    );
    /// @notice `amount` more arrived.
    event Funded(bytes32 indexed jobId, address indexed from, uint128 amount);
    /// @notice A root was taken. `dataHash` is the sha256 of its leaves file; it pays from `activeAt` on.
    event Settled(
        bytes32 indexed jobId, uint64 indexed round, bytes32 root, uint128 total, bytes32 dataHash, uint48 activeAt
    );
    /// @notice A leaf of `cumulative` paid `amount`, a relayer's tip included.
    event Claimed(bytes32 indexed jobId, address indexed account, address to, uint128 amount, uint128 cumulative);
    /// @notice An item of a batch was not paid; `reason` is the selector of the error that says why.
    event ClaimSkipped(bytes32 indexed jobId, address indexed account, bytes4 reason);
    /// @notice A voucher of `cumulative` paid `amount`.
    event VoucherRedeemed(bytes32 indexed jobId, address indexed account, uint128 amount, uint128 cumulative);
    /// @notice A leaf counted `amount` that a voucher had paid: it is free again.
    event AdvanceCounted(bytes32 indexed jobId, address indexed account, uint128 amount);
    /// @notice The owner got back what was not settled.
    event Reclaimed(bytes32 indexed jobId, address indexed owner, uint128 amount);
    /// @notice No new root is taken any more.
    event Halted(bytes32 indexed jobId, uint48 deadline);
    /// @notice `hub` takes over at `activeAt`.
    event HubProposed(bytes32 indexed jobId, address hub, uint48 activeAt);
    /// @notice Owner and hub ended the job early.
    event Closed(bytes32 indexed jobId, uint48 deadline);

    /// @notice This owner used the salt before.
    error JobExists(bytes32 jobId);
    /// @notice No job has this id.
    error NoSuchJob(bytes32 jobId);
    /// @notice Only the job's owner may do that.
    error NotOwner(address caller, address owner);
    /// @notice Only the job's hub may do that without a signature.
    error NotHub(address caller, address hub);
    /// @notice Only the job's owner or hub may do that.
    error NotAParty(address caller, address owner, address hub);
    /// @notice The signature is not `signer`'s, or not of this message on this chain for this contract.
    error BadSignature(address signer);
    /// @notice There is no contract at the token's address.
    error BadToken(address token);
    /// @notice A job needs a hub.
    error BadHub(address hub);
    /// @notice A deadline must lie ahead.
    error BadDeadline(uint48 deadline, uint256 time);
    /// @notice The activation delay is longer than the grace time.
    error BadDelay(uint32 activationDelay, uint32 grace);
    /// @notice No tree has this root.
    error BadRoot(bytes32 root);
    /// @notice Nobody can be paid there.
    error BadRecipient(address to);
    /// @notice The job's deadline is over.
    error DeadlinePassed(uint48 deadline, uint256 time);
    /// @notice Settlements and vouchers were taken until `closedAfter`, deadline plus grace.
    error WindowClosed(uint256 closedAfter, uint256 time);
    /// @notice The owner can reclaim strictly after `opensAfter`, deadline plus grace.
    error TooEarly(uint256 opensAfter, uint256 time);
    /// @notice The account's signature counted until `validUntil`.
    error Expired(uint48 validUntil, uint256 time);
    /// @notice The owner has halted the job.
    error JobHalted(bytes32 jobId);
    /// @notice The last root is active from `activeAt` on; the next one can come then.
    error RootPending(uint48 activeAt, uint256 time);
    /// @notice The round is settled, or a later one is.
    error RoundNotNew(uint64 round, uint64 lastRound);
    /// @notice Totals are cumulative and never fall.
    error TotalFell(uint128 total, uint128 lastTotal);
    /// @notice A settlement may raise the total by `cap`.
    error RoundCapExceeded(uint128 raised, uint128 cap);
    /// @notice The job's money does not reach.
    error NotCovered(uint256 needed, uint256 available);
    /// @notice The active root has no such leaf.
    error BadProof(address account, uint128 cumulative);
    /// @notice The account was paid that already: `claimed` in all.
    error NothingToClaim(address account, uint128 claimed);
    /// @notice Everything is settled or given back.
    error NothingToReclaim(bytes32 jobId);
    /// @notice The tip is more than the payment.
    error TipTooHigh(uint128 tip, uint128 amount);
    /// @notice The token did not pay. Only ever a reason in `ClaimSkipped`.
    error TransferFailed(address token, address to);

    constructor() EIP712("TrainChain", "1") {}

    /// @notice Open a job and pay `amount` into it. `p.salt` makes the id; the same owner and salt only work once.
    /// @return jobId As `jobIdOf(msg.sender, p.salt)` gives it.
    function createJob(JobParams calldata p, uint128 amount) external nonReentrant returns (bytes32 jobId) {
        return _create(p, amount);
    }

    /// @notice As `createJob`, with the token's permit for `amount`. A permit that fails (spent by a front-runner,
    /// or the token has none) is ignored: the allowance then decides.
    function createJobWithPermit(
        JobParams calldata p,
        uint128 amount,
        uint256 permitDeadline,
        uint8 v,
        bytes32 r,
        bytes32 s
    ) external nonReentrant returns (bytes32 jobId) {
        _tryPermit(p.token, amount, permitDeadline, v, r, s);
        return _create(p, amount);
    }

    /// @notice Add to a job's budget until its deadline. Anyone may; what is left over goes to the owner.
    function fund(bytes32 jobId, uint128 amount) external nonReentrant {
        _fund(jobId, amount);
    }

    /// @notice As `fund`, with the token's permit for `amount`; see `createJobWithPermit`.
    function fundWithPermit(bytes32 jobId, uint128 amount, uint256 permitDeadline, uint8 v, bytes32 r, bytes32 s)
        external
        nonReentrant
    {
        _tryPermit(_job(jobId).token, amount, permitDeadline, v, r, s);
        _fund(jobId, amount);
    }

    /// @notice Take no new root from now on. What was settled, pending or active, stays claimable; vouchers stay
    /// redeemable, and the grace time runs from now.
    function halt(bytes32 jobId) external {
        Job storage j = _owned(jobId);
        if (j.halted) revert JobHalted(jobId);
        j.halted = true;
        if (block.timestamp < j.deadline) j.deadline = uint48(block.timestamp);
        emit Halted(jobId, j.deadline);
    }

    /// @notice Name another hub. It takes over, and the old one's unredeemed vouchers lapse, after the grace time: the
    /// time that a halt leaves them. Naming the present hub takes a proposal back.
    function proposeHub(bytes32 jobId, address hub) external {
        Job storage j = _owned(jobId);
        if (hub == address(0)) revert BadHub(hub);
        j.hub = _hubOf(j);
        j.nextHub = hub;
        j.nextHubAt = SafeCast.toUint48(block.timestamp + j.grace);
        emit HubProposed(jobId, hub, j.nextHubAt);
    }

    /// @notice Owner or hub sets the deadline to now, with the other's CloseEarly signature. The grace time runs.
    function closeEarly(bytes32 jobId, bytes calldata otherSig) external {
        Job storage j = _job(jobId);
        (address owner, address hub) = (j.owner, _hubOf(j));
        if (msg.sender != owner && msg.sender != hub) revert NotAParty(msg.sender, owner, hub);
        if (block.timestamp > j.deadline) revert DeadlinePassed(j.deadline, block.timestamp);
        bytes32 structHash = keccak256(abi.encode(CLOSE_EARLY_TYPEHASH, jobId));
        _checkSignature(msg.sender == owner ? hub : owner, structHash, otherSig);
        j.deadline = uint48(block.timestamp);
        emit Closed(jobId, j.deadline);
    }

    /// @notice Give the owner what was never settled, once no settlement or voucher can come any more.
    function reclaim(bytes32 jobId) external nonReentrant returns (uint128 amount) {
        Job storage j = _owned(jobId);
        uint256 end = uint256(j.deadline) + j.grace;
        if (block.timestamp <= end) revert TooEarly(end, block.timestamp);
        amount = _free(j);
        if (amount == 0) revert NothingToReclaim(jobId);
        j.refunded += amount;
        emit Reclaimed(jobId, msg.sender, amount);
        IERC20(j.token).safeTransfer(msg.sender, amount);
    }

    /// @notice Record a round's root. While the last one waits for its delay to pass, none is taken.
    /// @param round Higher than the last; rounds may be skipped.
    /// @param root Of the standard tree of (account, cumulative amount); leaves never fall.
    /// @param total The sum of its leaves: at least the last total, at most `roundCap` more, and covered.
    /// @param dataHash sha256 of the leaves file.
    function settle(bytes32 jobId, uint64 round, bytes32 root, uint128 total, bytes32 dataHash) external {
        Job storage j = _job(jobId);
        address hub = _hubOf(j);
        if (msg.sender != hub) revert NotHub(msg.sender, hub);
        _settle(j, jobId, round, root, total, dataHash);
    }

    /// @notice As `settle`, sent by anyone with the hub's Settlement signature.
    function settleWithSignature(
        bytes32 jobId,
        uint64 round,
        bytes32 root,
        uint128 total,
        bytes32 dataHash,
        bytes calldata hubSig
    ) external {
        Job storage j = _job(jobId);
        bytes32 structHash = keccak256(abi.encode(SETTLEMENT_TYPEHASH, jobId, round, root, total, dataHash));
        _checkSignature(_hubOf(j), structHash, hubSig);
        _settle(j, jobId, round, root, total, dataHash);
    }

    /// @notice Pay `account` what its leaf of the active root holds beyond what it was paid. Anyone may call.
    /// @return paid 0 only where the leaf counted an advance.
    function claim(bytes32 jobId, address account, uint128 cumulative, bytes32[] calldata proof)
        external
        nonReentrant
        returns (uint128 paid)
    {
        Job storage j = _job(jobId);
        paid = _book(j, jobId, account, cumulative, proof);
        if (paid != 0) {
            emit Claimed(jobId, account, account, paid, cumulative);
            IERC20(j.token).safeTransfer(account, paid);
        }
    }

    /// @notice As `claim` for many. An item that cannot be paid is skipped with the selector of the reason.
    /// @return paid What each item paid.
    function claimMany(ClaimItem[] calldata items) external nonReentrant returns (uint128[] memory paid) {
        paid = new uint128[](items.length);
        for (uint256 i = 0; i < items.length; ++i) {
            paid[i] = _claimOrSkip(items[i]);
        }
    }

    /// @notice Pay `account`'s leaf to another address, with the account's ClaimTo signature; `tip` goes to the
    /// caller.
    /// @return paid Both together.
    function claimTo(ClaimToParams calldata p, bytes32[] calldata proof, bytes calldata accountSig)
        external
        nonReentrant
        returns (uint128 paid)
    {
        if (block.timestamp > p.validUntil) revert Expired(p.validUntil, block.timestamp);
        if (p.to == address(0) || p.to == address(this)) revert BadRecipient(p.to);
        Job storage j = _job(p.jobId);
        bytes32 structHash = keccak256(
            abi.encode(CLAIM_TO_TYPEHASH, p.jobId, p.account, p.to, p.cumulative, p.tip, p.validUntil)
        );
        _checkSignature(p.account, structHash, accountSig);
        paid = _book(j, p.jobId, p.account, p.cumulative, proof);
        if (paid == 0) revert NothingToClaim(p.account, _accounts[p.jobId][p.account].claimed);
        if (p.tip > paid) revert TipTooHigh(p.tip, paid);
        emit Claimed(p.jobId, p.account, p.to, paid, p.cumulative);
        IERC20(j.token).safeTransfer(p.to, paid - p.tip);
        if (p.tip != 0) IERC20(j.token).safeTransfer(msg.sender, p.tip);
    }

    /// @notice Pay `account` up to the hub's signed promise, from what is not settled; all of it or nothing.
    /// Claim the leaf first: money that a leaf holds is otherwise reserved twice until the leaf is proven.
    function redeemVoucher(bytes32 jobId, address account, uint128 cumulative, bytes calldata hubSig)
        external
        nonReentrant
        returns (uint128 paid)
    {
        Job storage j = _job(jobId);
        _checkWindow(j);
        _checkSignature(_hubOf(j), keccak256(abi.encode(VOUCHER_TYPEHASH, jobId, account, cumulative)), hubSig);
        Account storage a = _accounts[jobId][account];
        if (cumulative <= a.claimed) revert NothingToClaim(account, a.claimed);
        paid = cumulative - a.claimed;
        uint128 free = _free(j);
        if (paid > free) revert NotCovered(paid, free);
        a.claimed = cumulative;
        a.advanced += paid;
        j.settled += paid;
        j.claimed += paid;
        emit VoucherRedeemed(jobId, account, paid, cumulative);
        IERC20(j.token).safeTransfer(account, paid);
    }

    /// @notice The id of a job, before or after it is opened; no other chain, contract, owner or salt gives it.
    function jobIdOf(address owner, bytes32 salt) public view returns (bytes32) {
        return keccak256(abi.encode(block.chainid, address(this), owner, salt));
    }

    /// @notice The job as a call at this moment would find it: a ripe root or hub shows as the present one.
    function job(bytes32 jobId) external view returns (Job memory j) {
        j = _job(jobId);
        if (block.timestamp >= j.nextHubAt && j.nextHub != address(0)) {
            (j.hub, j.nextHub, j.nextHubAt) = (j.nextHub, address(0), 0);
        }
        if (block.timestamp >= j.pendingAt && j.pendingRoot != bytes32(0)) {
            (j.root, j.pendingRoot, j.pendingAt) = (j.pendingRoot, bytes32(0), 0);
        }
        if (j.root == NO_ROOT) j.root = bytes32(0);
    }

    /// @notice Everything the account was paid in the job, by leaf or voucher.
    function claimedOf(bytes32 jobId, address account) external view returns (uint128) {
        return _accounts[jobId][account].claimed;
    }

    /// @notice What vouchers paid the account that no proven leaf has counted yet.
    function advancedOf(bytes32 jobId, address account) external view returns (uint128) {
        return _accounts[jobId][account].advanced;
    }

    /// @notice What the hub signs so that anyone can settle.
    function settlementDigest(bytes32 jobId, uint64 round, bytes32 root, uint128 total, bytes32 dataHash)
        external
        view
        returns (bytes32)
    {
        return _hashTypedDataV4(keccak256(abi.encode(SETTLEMENT_TYPEHASH, jobId, round, root, total, dataHash)));
    }

    /// @notice What the hub signs as a voucher.
    function voucherDigest(bytes32 jobId, address account, uint128 cumulative) external view returns (bytes32) {
        return _hashTypedDataV4(keccak256(abi.encode(VOUCHER_TYPEHASH, jobId, account, cumulative)));
    }

    function _create(JobParams calldata p, uint128 amount) private returns (bytes32 jobId) {
        jobId = jobIdOf(msg.sender, p.salt);
        Job storage j = _jobs[jobId];
        if (j.owner != address(0)) revert JobExists(jobId);
        if (p.token.code.length == 0) revert BadToken(p.token);
        if (p.hub == address(0)) revert BadHub(p.hub);
        if (p.deadline <= block.timestamp) revert BadDeadline(p.deadline, block.timestamp);
        if (p.activationDelay > p.grace) revert BadDelay(p.activationDelay, p.grace);
        j.owner = msg.sender;
        j.deadline = p.deadline;
        j.grace = p.grace;
        j.hub = p.hub;
        j.activationDelay = p.activationDelay;
        j.token = p.token;
        j.roundCap = p.roundCap;
        j.specHash = p.specHash;
        j.root = NO_ROOT;
        uint128 received = _pull(p.token, amount);
        j.funded = received;
        emit JobCreated(jobId, msg.sender, p.token, p.hub, received, p.deadline, p.specHash);
    }

    function _fund(bytes32 jobId, uint128 amount) private {
        Job storage j = _job(jobId);
        if (block.timestamp > j.deadline) revert DeadlinePassed(j.deadline, block.timestamp);
        uint128 received = _pull(j.token, amount);
        j.funded += received;
        emit Funded(jobId, msg.sender, received);
    }

    function _pull(address token, uint128 amount) private returns (uint128) {
        if (amount == 0) return 0;
        uint256 before = IERC20(token).balanceOf(address(this));
        IERC20(token).safeTransferFrom(msg.sender, address(this), amount);
        return SafeCast.toUint128(IERC20(token).balanceOf(address(this)) - before);
    }

    function _tryPermit(address token, uint256 amount, uint256 deadline, uint8 v, bytes32 r, bytes32 s) private {
        // A low-level call: a token without permit, or none at all, must not revert here.
        bytes memory data =
            abi.encodeCall(IERC20Permit.permit, (msg.sender, address(this), amount, deadline, v, r, s));
        (bool ok,) = token.call(data);
        ok;
    }

    function _settle(Job storage j, bytes32 jobId, uint64 round, bytes32 root, uint128 total, bytes32 dataHash)
        private
    {
        _checkWindow(j);
        if (j.halted) revert JobHalted(jobId);
        if (root == bytes32(0) || root == NO_ROOT) revert BadRoot(root);
        if (round <= j.round) revert RoundNotNew(round, j.round);
        if (total < j.total) revert TotalFell(total, j.total);
        // An unripe root is never replaced: a hub that settles often could put off every root for ever.
        if (block.timestamp < j.pendingAt) revert RootPending(j.pendingAt, block.timestamp);
        uint128 raised = total - j.total;
        // However many rounds it skips: the round's number is the hub's word alone.
        if (raised > j.roundCap) revert RoundCapExceeded(raised, j.roundCap);
        uint128 free = _free(j);
        if (raised > free) revert NotCovered(raised, free);

        uint48 activeAt = SafeCast.toUint48(block.timestamp + j.activationDelay);
        if (j.activationDelay == 0) {
            j.root = root;
        } else {
            if (j.pendingAt != 0) j.root = j.pendingRoot;
            j.pendingRoot = root;
            j.pendingAt = activeAt;
        }
        j.round = round;
        j.total = total;
        j.settled += raised;
        emit Settled(jobId, round, root, total, dataHash, activeAt);
    }

    function _claimOrSkip(ClaimItem calldata item) private returns (uint128 paid) {
        Job storage j = _jobs[item.jobId];
        Account storage a = _accounts[item.jobId][item.account];
        uint128 counted;
        bytes4 reason;
        (paid, counted, reason) = _owed(j, a, item.account, item.cumulative, item.proof);
        if (reason == bytes4(0)) {
            _write(j, a, paid, counted);
            if (paid != 0) {
                if (_tryTransfer(j.token, item.account, paid)) {
                    emit Claimed(item.jobId, item.account, item.account, paid, item.cumulative);
                } else {
                    // Taken back, not put back as it was: while the token was called, a settlement may have come.
                    (a.claimed, a.advanced) = (a.claimed - paid, a.advanced + counted);
                    (j.settled, j.claimed) = (j.settled + counted, j.claimed - paid);
                    reason = TransferFailed.selector;
                }
            }
        }
        if (reason != bytes4(0)) {
            emit ClaimSkipped(item.jobId, item.account, reason);
            return 0;
        }
        if (counted != 0) emit AdvanceCounted(item.jobId, item.account, counted);
    }

    /// Of what the token answers no more than a word is read: a long answer costs the batch nothing.
    function _tryTransfer(address token, address to, uint256 amount) private returns (bool done) {
        bytes memory data = abi.encodeCall(IERC20.transfer, (to, amount));
        uint256 length;
        uint256 answer;
        assembly ("memory-safe") {
            done := call(TRANSFER_GAS, token, 0, add(data, 32), mload(data), 0, 32)
            length := returndatasize()
            answer := mload(0)
        }
        if (length == 0) return done && token.code.length != 0;
        return done && length >= 32 && answer == 1;
    }

    /// Check a leaf and write down its payment. Returns 0 where only an advance was counted.
    function _book(Job storage j, bytes32 jobId, address account, uint128 cumulative, bytes32[] calldata proof)
        private
        returns (uint128 paid)
    {
        Account storage a = _accounts[jobId][account];
        uint128 counted;
        bytes4 reason;
        (paid, counted, reason) = _owed(j, a, account, cumulative, proof);
        if (reason == BadProof.selector) revert BadProof(account, cumulative);
        if (reason == NothingToClaim.selector) revert NothingToClaim(account, a.claimed);
        if (reason == NotCovered.selector) revert NotCovered(cumulative - a.claimed, j.settled - j.claimed);
        _write(j, a, paid, counted);
        if (counted != 0) emit AdvanceCounted(jobId, account, counted);
    }

    function _write(Job storage j, Account storage a, uint128 paid, uint128 counted) private {
        // All sums before all stores, so that two stores to one slot become one.
        (uint128 accountClaimed, uint128 advanced) = (a.claimed + paid, a.advanced - counted);
        (uint128 settled, uint128 claimed) = (j.settled - counted, j.claimed + paid);
        (a.claimed, a.advanced) = (accountClaimed, advanced);
        (j.settled, j.claimed) = (settled, claimed);
    }

    /// What a leaf pays, and how much of the account's advance it counts; or why neither.
    function _owed(
        Job storage j,
        Account storage a,
        address account,
        uint128 cumulative,
        bytes32[] calldata proof
    ) private view returns (uint128 paid, uint128 counted, bytes4 reason) {
        bytes32 root = _rootOf(j);
        bytes32 leaf = keccak256(bytes.concat(keccak256(abi.encode(account, uint256(cumulative)))));
        if (!MerkleProof.verifyCalldata(proof, root, leaf)) return (0, 0, BadProof.selector);
        (uint128 claimed, uint128 advanced) = (a.claimed, a.advanced);
        if (cumulative > claimed) paid = cumulative - claimed;
        uint128 room = j.settled - j.claimed;
        // Only a root whose leaves sum to more than its total gets here; the cap protects other jobs' money.
        if (paid > room) return (0, 0, NotCovered.selector);
        uint128 byLeaf = claimed - advanced;
        if (cumulative > byLeaf) counted = _min(_min(cumulative - byLeaf, advanced), room - paid);
        if (paid == 0 && counted == 0) reason = NothingToClaim.selector;
    }

    function _min(uint128 a, uint128 b) private pure returns (uint128) {
        return a < b ? a : b;
    }

    function _job(bytes32 jobId) private view returns (Job storage j) {
        j = _jobs[jobId];
        // The token stands beside what every claim reads anyway.
        if (j.token == address(0)) revert NoSuchJob(jobId);
    }

    function _owned(bytes32 jobId) private view returns (Job storage j) {
        j = _job(jobId);
        if (msg.sender != j.owner) revert NotOwner(msg.sender, j.owner);
    }

    function _hubOf(Job storage j) private view returns (address) {
        return j.nextHubAt != 0 && block.timestamp >= j.nextHubAt ? j.nextHub : j.hub;
    }

    function _rootOf(Job storage j) private view returns (bytes32) {
        return j.pendingAt != 0 && block.timestamp >= j.pendingAt ? j.pendingRoot : j.root;
    }

    function _free(Job storage j) private view returns (uint128) {
        return j.funded - j.refunded - j.settled;
    }

    function _checkWindow(Job storage j) private view {
        uint256 end = uint256(j.deadline) + j.grace;
        if (block.timestamp > end) revert WindowClosed(end, block.timestamp);
    }

    function _checkSignature(address signer, bytes32 structHash, bytes calldata signature) private view {
        if (!SignatureChecker.isValidSignatureNow(signer, _hashTypedDataV4(structHash), signature)) {
            revert BadSignature(signer);
        }
    }
}
