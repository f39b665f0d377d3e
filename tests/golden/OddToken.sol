// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.24;

/// A token with every bad habit at hand: no return values, no permit, a fee, a blocklist, a call out on transfer,
/// and tempers.
contract OddToken {
    mapping(address => uint256) public balanceOf;
    mapping(address => mapping(address => uint256)) public allowance;
    uint256 public feePercent;
    mapping(address => bool) public blocked;
    address public target;
    bytes public message;
    bytes public answer;
    uint256 public temper;

    constructor(uint256 supply) {
        balanceOf[msg.sender] = supply;
    }

    function setFee(uint256 percent) external {
        feePercent = percent;
    }

    function setBlocked(address account, bool yes) external {
        blocked[account] = yes;
    }

    function setCall(address to, bytes calldata data) external {
        (target, message) = (to, data);
    }

    /// 1 burns all gas, 2 answers at length, 3 says no, 4 says what is neither yes nor no, 5 says nothing it can mean,
    /// 6 calls out and then says no.
    function setTemper(uint256 which) external {
        temper = which;
    }

    function approve(address spender, uint256 amount) external {
        allowance[msg.sender][spender] = amount;
    }

    function transfer(address to, uint256 amount) external {
        uint256 which = temper;
        assembly {
            switch which
            case 1 { invalid() }
            case 2 { revert(0, 500000) }
            case 3 {
                mstore(0, 0)
                return(0, 32)
            }
            case 4 {
                mstore(0, 2)
                return(0, 32)
            }
            case 5 { return(0, 5) }
        }
        if (which == 6) {
            (, answer) = target.call(message);
            assembly {
                mstore(0, 0)
                return(0, 32)
            }
        }
        _move(msg.sender, to, amount);
    }

    function transferFrom(address from, address to, uint256 amount) external {
        allowance[from][msg.sender] -= amount;
        _move(from, to, amount);
    }

    function _move(address from, address to, uint256 amount) private {
        require(!blocked[to], "blocked");
        balanceOf[from] -= amount;
        balanceOf[to] += amount - (amount * feePercent) / 100;
        if (target != address(0)) {
            (, bytes memory data) = target.call(message);
            answer = data;
        }
    }
}
